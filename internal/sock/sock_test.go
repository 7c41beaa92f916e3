// This file tests how the socket below a wrapper is found.

package sock

import (
	"crypto/tls"
	"io"
	"net"
	"testing"
)

type embeds struct{ net.Conn }

type embedsPointer struct{ *net.TCPConn }

type hides struct{ conn net.Conn }

type fieldOfThatName struct {
	Conn net.Conn // not embedded: it may be anything
}

type hasRaw struct {
	net.Conn
	inner net.Conn
}

func (c *hasRaw) Raw() net.Conn { return c.inner }

type hasNetConn struct{ inner net.Conn }

func (c *hasNetConn) NetConn() net.Conn { return c.inner }

func TestBelow(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	conn, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	tcp := conn.(*net.TCPConn)
	var none *embeds
	for _, test := range []struct {
		name  string
		conn  any
		found bool
	}{
		{"TCP", tcp, true},
		{"TLS", tls.Server(tcp, nil), true},
		{"TLS over a wrapper", tls.Server(embeds{tcp}, nil), true},
		{"embedding", embeds{tcp}, true},
		{"pointer to embedding", &embeds{tcp}, true},
		{"embedding what embeds", embeds{&embeds{tcp}}, true},
		{"embedding the socket's own type", embedsPointer{tcp}, true},
		{"Raw", &hasRaw{inner: tcp}, true},
		{"NetConn", &hasNetConn{tcp}, true},
		{"all of them", embeds{tls.Server(&struct{ embeds }{embeds{&hasRaw{inner: tcp}}}, nil)}, true},
		{"a hidden one", hides{tcp}, false},
		{"a field that is not embedded", fieldOfThatName{tcp}, false},
		{"embedding nothing", embeds{}, false},
		{"Raw of nothing", &hasRaw{}, false},
		{"NetConn of nothing", &hasNetConn{}, false},
		{"a nil pointer", none, false},
		{"nil", nil, false},
		{"no connection at all", io.Discard, false},
		{"a number", 42, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			got := Below(test.conn)
			if test.found && got != any(tcp) && test.name != "embedding the socket's own type" || !test.found && got != nil {
				t.Errorf("got %T, want found %t", got, test.found)
			}
		})
	}
}
