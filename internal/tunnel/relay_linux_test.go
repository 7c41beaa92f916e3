// This file tests, over real sockets, that no byte is lost, added or changed,
// whatever carries it.

package tunnel

import (
	"crypto/sha256"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/pires/go-proxyproto"

	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
)

// peer is the far end of a leg.
type peer interface {
	net.Conn
	CloseWrite() error
}

// Wrappers as there are in Caddy. embeds hides CloseWrite, opaque everything.
type embeds struct{ net.Conn }

type opaque struct{ inner net.Conn }

func (o *opaque) Read(b []byte) (int, error)         { return o.inner.Read(b) }
func (o *opaque) Write(b []byte) (int, error)        { return o.inner.Write(b) }
func (o *opaque) Close() error                       { return o.inner.Close() }
func (o *opaque) CloseWrite() error                  { return o.inner.(peer).CloseWrite() }
func (o *opaque) LocalAddr() net.Addr                { return o.inner.LocalAddr() }
func (o *opaque) RemoteAddr() net.Addr               { return o.inner.RemoteAddr() }
func (o *opaque) SetDeadline(t time.Time) error      { return o.inner.SetDeadline(t) }
func (o *opaque) SetReadDeadline(t time.Time) error  { return o.inner.SetReadDeadline(t) }
func (o *opaque) SetWriteDeadline(t time.Time) error { return o.inner.SetWriteDeadline(t) }

// shouts is a connection whose bytes are not those of the socket it embeds.
type shouts struct{ *net.TCPConn }

func (s shouts) Read(b []byte) (int, error) {
	n, err := s.TCPConn.Read(b)
	for i := range b[:n] {
		b[i] ^= 0x20
	}
	return n, err
}

// kinds are the pairs of legs that differ in how bytes are carried.
var kinds = []struct {
	name string
	legs func(t *testing.T) (nearClient, nearBackend net.Conn, client, backend peer)
}{
	{"TCP to TCP", func(t *testing.T) (_, _ net.Conn, _, _ peer) {
		a, client := tcpPair(t)
		b, backend := tcpPair(t)
		return a, b, client, backend
	}},
	{"TCP to Unix", func(t *testing.T) (_, _ net.Conn, _, _ peer) {
		a, client := tcpPair(t)
		b, backend := unixPair(t)
		return a, b, client, backend
	}},
	{"embedded to TCP", func(t *testing.T) (_, _ net.Conn, _, _ peer) {
		a, client := tcpPair(t)
		b, backend := tcpPair(t)
		return embeds{&embeds{a}}, b, client, backend
	}},
	{"PROXY protocol to TCP", func(t *testing.T) (_, _ net.Conn, _, _ peer) {
		a, client := tcpPair(t)
		b, backend := tcpPair(t)
		send(t, client, "PROXY TCP4 192.0.2.7 192.0.2.8 1000 443\r\n")
		return proxyproto.NewConn(a), b, client, backend
	}},
	{"opaque to opaque", func(t *testing.T) (_, _ net.Conn, _, _ peer) {
		a, client := tcpPair(t)
		b, backend := unixPair(t)
		return &opaque{a}, &opaque{b}, client, backend
	}},
}

func eachKind(t *testing.T, set Settings, early string, test func(t *testing.T, r *rig, client, backend peer)) {
	for _, kind := range kinds {
		t.Run(kind.name, func(t *testing.T) {
			nearClient, nearBackend, client, backend := kind.legs(t)
			test(t, start(t, set, nearClient, nearBackend, early), client, backend)
		})
	}
}

// digest sends size random bytes in writes of random sizes up to most, and returns
// their hash.
func digest(w io.Writer, size, most int, seed uint64) ([32]byte, error) {
	random := rand.New(rand.NewPCG(seed, 1))
	bytes := rand.NewChaCha8([32]byte{byte(seed)})
	h, b := sha256.New(), make([]byte, most)
	for size > 0 {
		p := b[:min(size, 1+random.IntN(most))]
		_, _ = bytes.Read(p)
		h.Write(p)
		if _, err := w.Write(p); err != nil {
			return [32]byte{}, err
		}
		size -= len(p)
	}
	return [32]byte(h.Sum(nil)), nil
}

func TestBytesAreTheSame(t *testing.T) {
	for _, test := range []struct {
		name       string
		size, most int
	}{
		{"64 MiB in random writes", 64 << 20, 200_000},
		{"1 MiB byte by byte", 1 << 20, 1},
	} {
		t.Run(test.name, func(t *testing.T) {
			eachKind(t, Settings{}, "early", func(t *testing.T, r *rig, client, backend peer) {
				size := test.size
				if _, spliced := r.tunnel.client.conn.(*net.TCPConn); !spliced || raceEnabled {
					size /= 8
				}
				_, _ = client.SetDeadline(time.Now().Add(time.Minute)), backend.SetDeadline(time.Now().Add(time.Minute))
				wantText(t, backend, "early")
				var all sync.WaitGroup
				for way, ends := range [][2]peer{{client, backend}, {backend, client}} {
					var sent [32]byte
					written := make(chan struct{})
					all.Go(func() {
						defer close(written)
						var err error
						if sent, err = digest(ends[0], size, test.most, uint64(way)); err != nil {
							t.Errorf("writing: %v", err)
						}
						_ = ends[0].CloseWrite()
					})
					all.Go(func() {
						h := sha256.New()
						n, err := io.Copy(h, ends[1])
						<-written
						if got := [32]byte(h.Sum(nil)); got != sent || int(n) != size || err != nil {
							t.Errorf("way %d: got %d bytes with another hash (%v), want all %d as they were", way, n, err, size)
						}
					})
				}
				all.Wait()
				r.wantEnd(testTimeout, registry.EOF)
				if got := r.rec.View(); int(got.BytesIn) != size+len("early") || int(got.BytesOut) != size {
					t.Errorf("got %d bytes in and %d out counted, want %d and %d", got.BytesIn, got.BytesOut, size+5, size)
				}
			})
		})
	}
}

// Bytes do not bypass the Read of a connection that only looks like a socket.
func TestWrapperOfASocketIsRead(t *testing.T) {
	a, client := tcpPair(t)
	b, backend := tcpPair(t)
	start(t, Settings{}, shouts{a}, b, "")
	send(t, client, "hello")
	wantText(t, backend, "HELLO")
}

func TestHalfCloseEachWay(t *testing.T) {
	eachKind(t, Settings{}, "", func(t *testing.T, r *rig, client, backend peer) {
		send(t, client, "request")
		_ = client.CloseWrite()
		wantText(t, backend, "request")
		wantEOF(t, backend)
		send(t, backend, "the whole answer")
		_ = backend.Close()
		wantText(t, client, "the whole answer")
		wantEOF(t, client)
		r.wantEnd(time.Second, registry.EOF)
		r.wantCounted(7, 16)
	})
	eachKind(t, Settings{}, "", func(t *testing.T, r *rig, client, backend peer) {
		send(t, backend, "greeting")
		_ = backend.CloseWrite()
		wantText(t, client, "greeting")
		wantEOF(t, client)
		send(t, client, "goodbye")
		_ = client.Close()
		wantText(t, backend, "goodbye")
		wantEOF(t, backend)
		r.wantEnd(time.Second, registry.EOF)
	})
}

// A peer that closes for good has ended, like one that closes one way.
func TestClose(t *testing.T) {
	eachKind(t, Settings{}, "", func(t *testing.T, r *rig, client, backend peer) {
		_ = backend.Close()
		wantEOF(t, client)
		_ = client.Close()
		r.wantEnd(time.Second, registry.EOF)
	})
}

// A side ends while megabytes are on their way to a peer that does not read yet.
func TestEndBehindMuchData(t *testing.T) {
	eachKind(t, Settings{}, "", func(t *testing.T, r *rig, client, backend peer) {
		const size = 6 << 20
		var sent [32]byte
		var all sync.WaitGroup
		all.Go(func() {
			sent, _ = digest(backend, size, 1<<20, 3)
			_ = backend.CloseWrite()
		})
		_ = client.CloseWrite()
		wantEOF(t, backend) // before anything of the other way is read
		h := sha256.New()
		b := make([]byte, 1000)
		for range 200 { // slowly at first
			m, err := client.Read(b)
			if err != nil {
				t.Fatal(err)
			}
			h.Write(b[:m])
		}
		if _, err := io.Copy(h, client); err != nil {
			t.Fatal(err)
		}
		all.Wait()
		if [32]byte(h.Sum(nil)) != sent {
			t.Error("got other bytes than were sent")
		}
		r.wantEnd(time.Second, registry.EOF)
		r.wantCounted(0, size)
	})
}

func TestDeadlinesLeftByOthersAreCleared(t *testing.T) {
	eachKind(t, Settings{}, "", func(t *testing.T, r *rig, client, backend peer) {
		send(t, client, "a")
		wantText(t, backend, "a")
		// One that is set later, as by code that runs when a handler has returned,
		// does no harm either.
		_ = r.tunnel.client.conn.SetReadDeadline(time.Now())
		send(t, client, "b")
		wantText(t, backend, "b")
	})
	a, client := tcpPair(t)
	b, backend := tcpPair(t)
	_, _ = a.SetDeadline(past), b.SetDeadline(past)
	start(t, Settings{}, a, b, "early")
	wantText(t, backend, "early")
	send(t, backend, "answer")
	wantText(t, client, "answer")
}

// A client that cannot be half-closed is closed when the backend has ended, after
// everything that was for it.
func TestConnWithoutHalfClose(t *testing.T) {
	a, client := net.Pipe()
	b, backend := tcpPair(t)
	r := start(t, Settings{}, a, b, "")
	send(t, backend, "last")
	_ = backend.CloseWrite()
	_ = client.SetDeadline(time.Now().Add(testTimeout))
	wantText(t, client, "last")
	wantEOF(t, client)
	r.wantEnd(soon, registry.EOF)
}
