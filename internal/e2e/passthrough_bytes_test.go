// This file tests that bytes arrive through sni_passthrough as they were sent, and are
// counted: many at once, and one at a time.

package e2e

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/sha256"
	"crypto/tls"
	"io"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/holdfast-proxy/caddy-holdfast/internal/testca"
)

// carriers are the ways of bytes through the proxy: what a client and its backend speak,
// and whether they do it through TLS that caddy-l4 ends.
var carriers = []struct {
	name                  string
	clientTLS, backendTLS bool
	routes                func(backend string) string
}{
	{"plain", false, false, toAll},
	{"TLS", true, true, func(to string) string { return toSNI("one.test", to) }},
	{"TLS that ends at the proxy", true, false, func(to string) string {
		return "@one_test tls sni one.test\nroute @one_test {\ntls\nsni_passthrough " + to + "\n}\n"
	}},
}

// Both sides send at once, in pieces as large as they come: 1 GiB each in the long form.
// (Covers K7.)
func TestPassthroughBulk(t *testing.T) {
	testIdentity(t, int64(long2(64<<20, 1<<30)), 64<<10)
}

// Both sides send at once, each byte by itself: 1 MiB each in the long form.
func TestPassthroughBytes(t *testing.T) {
	testIdentity(t, int64(long2(128<<10, 1<<20)), 1)
}

// testIdentity has both sides send at once, in pieces of a size, and wants that all
// arrives unchanged and is counted.
func testIdentity(t *testing.T, size int64, piece int) {
	limit := long(60*time.Second, 5*time.Minute)
	a := testca.New(t)
	cert := a.Issue(t, "one.test", "one.test")
	for _, c := range carriers {
		t.Run(c.name, func(t *testing.T) {
			backends := make(chan exchange, 1)
			backend := tcpBackend(t, func(conn net.Conn) {
				_ = conn.SetDeadline(time.Now().Add(limit))
				if c.backendTLS {
					conn = tls.Server(conn, &tls.Config{Certificates: []tls.Certificate{cert}})
				}
				backends <- swap(conn, 2, size, piece)
				_, _ = conn.Read(make([]byte, 1)) // until the client has left
			})
			site := "respond ok\n"
			if c.clientTLS && !c.backendTLS {
				site += siteOf(a, "one.test", port(freeAddr(t)), "respond ok")
			}
			addr := freeAddr(t)
			p := startCaddy(t, "metrics\nauto_https disable_redirects\nlayer4 {\n"+addr+" {\n"+c.routes(backend+" {\n name bytes\n}")+"}\n}", site)
			before := [2]float64{p.bytesTotal(t, "in"), p.bytesTotal(t, "out")}

			wire := &counted{Conn: dialTCP(t, addr)}
			_ = wire.SetDeadline(time.Now().Add(limit))
			conn := net.Conn(wire)
			if c.clientTLS {
				conn = tls.Client(conn, &tls.Config{ServerName: "one.test", RootCAs: a.Pool()})
			}
			began := time.Now()
			client := swap(conn, 1, size, piece)
			if client.err != nil {
				t.Fatalf("client: %v", client.err)
			}
			server := <-backends
			if server.err != nil {
				t.Fatalf("backend: %v", server.err)
			}
			t.Logf("%d MiB/s each way", int64(float64(size>>20)/time.Since(began).Seconds()))
			if client.got != server.sent || server.got != client.sent {
				t.Error("not all arrived as it was sent")
			}
			in, out := uint64(wire.out.Load()), uint64(wire.in.Load())
			if c.clientTLS && !c.backendTLS {
				in, out = uint64(size), uint64(size) // what is in the records
			}
			if got := p.connections(t)[0]; got.BytesIn != in || got.BytesOut != out || in < uint64(size) || out < uint64(size) {
				t.Errorf("bytes of the connection: got %d in, %d out; want %d and %d", got.BytesIn, got.BytesOut, in, out)
			}
			_ = wire.Close() // without the alert that TLS would send
			p.waitEmpty(t)
			if i, o := p.bytesTotal(t, "in")-before[0], p.bytesTotal(t, "out")-before[1]; i != float64(in) || o != float64(out) {
				t.Errorf("bytes in all: got %.0f in, %.0f out; want %d and %d", i, o, in, out)
			}
		})
	}
}

// exchange is what came of sending and receiving.
type exchange struct {
	sent, got [32]byte // SHA-256
	err       error
}

// swap sends as much noise as it receives, at once, in pieces of a size.
func swap(conn net.Conn, seed byte, size int64, piece int) (e exchange) {
	if c, ok := conn.(*tls.Conn); ok {
		if e.err = c.Handshake(); e.err != nil {
			return e
		}
	}
	sending := make(chan error, 1)
	go send(conn, noise(seed), size, piece, &e.sent, sending)
	h := sha256.New()
	if _, e.err = io.CopyN(struct{ io.Writer }{h}, struct{ io.Reader }{conn}, size); e.err != nil {
		_ = conn.Close()
	}
	e.got = [32]byte(h.Sum(nil))
	if err := <-sending; e.err == nil {
		e.err = err
	}
	return e
}

// send owns writing to conn until all is sent or it breaks; then it says so.
func send(conn io.Writer, from cipher.Stream, size int64, piece int, sum *[32]byte, done chan<- error) {
	h := sha256.New()
	buf := make([]byte, 64<<10)
	for size > 0 {
		b := buf[:min(int64(len(buf)), size)]
		from.XORKeyStream(b, b)
		_, _ = h.Write(b)
		size -= int64(len(b))
		for len(b) > 0 {
			n, err := conn.Write(b[:min(piece, len(b))])
			if err != nil {
				done <- err
				return
			}
			b = b[n:]
		}
	}
	*sum = [32]byte(h.Sum(nil))
	done <- nil
}

// noise makes bytes that never repeat, fast also under the race detector.
func noise(seed byte) cipher.Stream {
	block, err := aes.NewCipher(bytes.Repeat([]byte{seed}, 16))
	if err != nil {
		panic(err)
	}
	return cipher.NewCTR(block, make([]byte, aes.BlockSize))
}

// counted counts what passes.
type counted struct {
	net.Conn
	in, out atomic.Int64
}

func (c *counted) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.in.Add(int64(n))
	return n, err
}

func (c *counted) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	c.out.Add(int64(n))
	return n, err
}

// bytesTotal is what the metric says of the route bytes.
func (p *proxy) bytesTotal(t testing.TB, direction string) float64 {
	t.Helper()
	return p.value(t, `caddy_connections_bytes_total{direction="`+direction+`",kind="passthrough",route="bytes"}`)
}

func port(addr string) string {
	_, port, _ := net.SplitHostPort(addr)
	return port
}
