package passthrough

import (
	"bytes"
	"crypto/tls"
	"io"
	"net"
	"testing"
	"time"

	"github.com/mholt/caddy-l4/layer4"
	"github.com/pires/go-proxyproto"
	"go.uber.org/zap"
)

// pair is a connection between two TCP sockets.
func pair(t *testing.T) (far, near *net.TCPConn) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	c, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	s, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close(); s.Close() })
	for _, conn := range []net.Conn{c, s} {
		_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
	}
	return c.(*net.TCPConn), s.(*net.TCPConn)
}

// hello is a ClientHello, cut into records of a size.
func hello(t *testing.T, name string, protocols []string, size int) []byte {
	t.Helper()
	ours, theirs := net.Pipe()
	go func() { // ends when the other end is closed
		_ = tls.Client(theirs, &tls.Config{ServerName: name, NextProtos: protocols, InsecureSkipVerify: true}).Handshake()
		_ = theirs.Close()
	}()
	defer ours.Close()
	head := make([]byte, 5)
	if _, err := io.ReadFull(ours, head); err != nil {
		t.Fatal(err)
	}
	body := make([]byte, int(head[3])<<8|int(head[4]))
	if _, err := io.ReadFull(ours, body); err != nil {
		t.Fatal(err)
	}
	var all []byte
	for len(body) > 0 {
		n := min(size, len(body))
		all = append(append(all, head[0], head[1], head[2], byte(n>>8), byte(n)), body[:n]...)
		body = body[n:]
	}
	return all
}

// What matching has read comes first, what it has not stays in the socket; nothing is read
// twice, and no deadline is left.
func TestDetach(t *testing.T) {
	for name, wrap := range map[string]func(cx *layer4.Connection) *layer4.Connection{
		"plain": func(cx *layer4.Connection) *layer4.Connection { return cx },
		"behind a PROXY header": func(cx *layer4.Connection) *layer4.Connection {
			conn := proxyproto.NewConn(cx, proxyproto.WithBufferSize(layer4.MaxBufLen))
			_ = conn.ProxyHeader() // as caddy-l4's handler does, which empties the buffer below
			return cx.Wrap(conn)
		},
	} {
		t.Run(name, func(t *testing.T) {
			far, near := pair(t)
			matched := "matched "
			want := near.RemoteAddr().String()
			if name != "plain" {
				matched, want = "PROXY TCP4 192.0.2.7 192.0.2.8 4711 443\r\nmatched ", "192.0.2.7:4711"
			}
			cx := wrap(layer4.WrapConnection(near, []byte(matched), zap.NewNop()))
			_ = cx.SetReadDeadline(time.Now().Add(time.Millisecond))
			if _, err := io.WriteString(far, "and more"); err != nil {
				t.Fatal(err)
			}
			c, err := NewClient(cx)
			if err != nil {
				t.Fatal(err)
			}
			if c.Addr.String() != want {
				t.Errorf("address: got %s, want %s", c.Addr, want)
			}
			conn, early, detached := c.Detach()
			if !detached || string(early) != "matched " {
				t.Fatalf("got %q, detached %t; want %q", early, detached, "matched ")
			}
			defer conn.Close()
			cx.Close() // as caddy-l4 does
			_ = far.CloseWrite()
			if got, err := io.ReadAll(conn); err != nil || string(got) != "and more" {
				t.Errorf("got %q, %v; want %q", got, err, "and more")
			}
			if _, err := io.WriteString(conn, "answer"); err != nil {
				t.Error(err)
			}
			_ = conn.(*net.TCPConn).CloseWrite()
			if got, err := io.ReadAll(far); err != nil || string(got) != "answer" {
				t.Errorf("got %q, %v; want %q", got, err, "answer")
			}
		})
	}
}

// A connection that others have changed is left to them, with all that it has.
func TestNotDetachable(t *testing.T) {
	far, near := pair(t)
	cx := layer4.WrapConnection(struct{ net.Conn }{near}, []byte("matched "), zap.NewNop())
	c, err := NewClient(cx)
	if err != nil {
		t.Fatal(err)
	}
	conn, early, detached := c.Detach()
	if detached || len(early) > 0 {
		t.Fatalf("got %q, detached %t; want neither", early, detached)
	}
	_, _ = io.WriteString(far, "and more")
	_ = far.CloseWrite()
	if got, err := io.ReadAll(conn); err != nil || string(got) != "matched and more" {
		t.Errorf("got %q, %v; want all", got, err)
	}
}

// What the PROXY protocol says comes from the ClientHello, however it was cut.
func TestTLVs(t *testing.T) {
	for name, tt := range map[string]struct {
		sent []byte
		want []proxyproto.TLV
	}{
		"one record": {hello(t, "one.test", []string{"h2", "http/1.1"}, 1<<14), []proxyproto.TLV{
			{Type: proxyproto.PP2_TYPE_AUTHORITY, Value: []byte("one.test")}, {Type: proxyproto.PP2_TYPE_ALPN, Value: []byte("h2")},
		}},
		"many records": {hello(t, "one.test", []string{"http/1.1"}, 100), []proxyproto.TLV{
			{Type: proxyproto.PP2_TYPE_AUTHORITY, Value: []byte("one.test")}, {Type: proxyproto.PP2_TYPE_ALPN, Value: []byte("http/1.1")},
		}},
		"no protocol": {hello(t, "one.test", nil, 1<<14), []proxyproto.TLV{{Type: proxyproto.PP2_TYPE_AUTHORITY, Value: []byte("one.test")}}},
		"no name":     {hello(t, "", nil, 1<<14), nil},
		"half of it":  {hello(t, "one.test", []string{"h2"}, 1<<14)[:50], nil},
		"no TLS":      {[]byte("GET / HTTP/1.1\r\n\r\n"), nil},
		"nothing":     {nil, nil},
	} {
		t.Run(name, func(t *testing.T) {
			_, near := pair(t)
			c, err := NewClient(layer4.WrapConnection(near, tt.sent, zap.NewNop()))
			if err != nil {
				t.Fatal(err)
			}
			got := c.TLVs()
			if len(got) != len(tt.want) {
				t.Fatalf("got %v, want %v", got, tt.want)
			}
			for i := range got {
				if got[i].Type != tt.want[i].Type || !bytes.Equal(got[i].Value, tt.want[i].Value) {
					t.Errorf("got %v, want %v", got, tt.want)
				}
			}
		})
	}
}
