// This file measures what a message costs: an echo through a session, over
// memory and over TCP.

package session

import (
	"bufio"
	"encoding/binary"
	"net"
	"testing"
	"time"

	"github.com/gobwas/ws"

	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
)

func BenchmarkEcho(b *testing.B) {
	pairs := map[string]func(b *testing.B) (near, far Conn){
		"memory": func(*testing.B) (Conn, Conn) { return newMemPipe(defaultBuffer) },
		"tcp":    newTCPPair,
	}
	sizes := []struct {
		name string
		size int
	}{{"64B", 64}, {"4KiB", 4 << 10}, {"64KiB", 64 << 10}}
	for name, pair := range pairs {
		for _, s := range sizes {
			b.Run(name+"/"+s.name, func(b *testing.B) { echo(b, s.size, pair) })
		}
	}
}

// echo sends messages one after the other and waits for each to come back.
func echo(b *testing.B, size int, pair func(b *testing.B) (near, far Conn)) {
	nearClient, client := pair(b)
	nearBackend, backend := pair(b)
	done := runSession(b, nearClient, nearBackend)

	// The backend says what a client says, without the mask, message by message.
	payload := make([]byte, size)
	in := ws.MustCompileFrame(ws.MaskFrameWith(ws.NewBinaryFrame(payload), ws.NewMask()))
	out := ws.MustCompileFrame(ws.NewBinaryFrame(payload))
	echoed := make(chan struct{})
	go func() {
		defer close(echoed)
		r := bufio.NewReaderSize(backend, 128<<10)
		for {
			if skipMessage(r) != nil {
				return
			}
			if _, err := backend.Write(out); err != nil {
				return
			}
		}
	}()

	r := bufio.NewReaderSize(client, 128<<10)
	b.SetBytes(int64(size))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := client.Write(in); err != nil {
			b.Fatal(err)
		}
		if err := skipMessage(r); err != nil {
			b.Fatal(err)
		}
	}
	b.StopTimer()
	_ = client.Close()
	_ = backend.Close()
	<-echoed
	<-done
}

// skipMessage reads a message, which may have been cut into fragments, and throws
// it away, as it does pings.
func skipMessage(r *bufio.Reader) error {
	for {
		head, err := r.Peek(2)
		if err != nil {
			return err
		}
		last := head[0]&0x8f < 0x88 && head[0]&0x80 != 0
		size, length := 2, int(head[1]&0x7f)
		switch length {
		case 126:
			size = 4
		case 127:
			size = 10
		}
		if head, err = r.Peek(size); err != nil {
			return err
		}
		switch size {
		case 4:
			length = int(binary.BigEndian.Uint16(head[2:]))
		case 10:
			length = int(binary.BigEndian.Uint64(head[2:]))
		}
		if head[1]&0x80 != 0 {
			size += 4
		}
		if _, err := r.Discard(size + length); err != nil || last {
			return err
		}
	}
}

// runSession runs a session with the default settings over two legs.
func runSession(b *testing.B, client, backend Conn) (done <-chan struct{}) {
	b.Helper()
	return runSessionIn(b, registry.New(), client, backend)
}

func runSessionIn(b *testing.B, reg *registry.Registry, client, backend Conn) (done <-chan struct{}) {
	b.Helper()
	route := reg.Retain(registry.WebSocket, "bench")
	rec, err := reg.Admit(route, registry.Info{Kind: registry.WebSocket, Protocol: "h1"}, opening{})
	if err != nil {
		b.Fatal(err)
	}
	up := route.Choose(func(func(string) registry.Load) string { return "app:80" })
	rec.Attempt(up, "app:80", time.Time{})
	rec.Open("")
	s := New(rec, newTestRoute(defaults), up, Peer{Conn: client}, Peer{Conn: backend}, false)
	rec.Handover(s)
	ran := make(chan struct{})
	go func() {
		defer close(ran)
		s.Run()
	}()
	return ran
}

// newTCPPair returns the two ends of a connection over loopback.
func newTCPPair(b *testing.B) (near, far Conn) {
	b.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer ln.Close()
	far, err = net.Dial("tcp", ln.Addr().String())
	if err != nil {
		b.Fatal(err)
	}
	near, err = ln.Accept()
	if err != nil {
		b.Fatal(err)
	}
	return near, far
}
