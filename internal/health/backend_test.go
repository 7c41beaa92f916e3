// This file has a backend that answers by a script, in memory.

package health

import (
	"bufio"
	"context"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gobwas/ws"

	"github.com/holdfast-proxy/caddy-holdfast/internal/handshake"
)

// upgrade is a true 101.
const upgrade = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: {accept}\r\n"

// backend answers every request with its script, in which "{accept}" stands for
// the right Sec-WebSocket-Accept, and then closes the connection, or reads
// until the peer does.
type backend struct {
	script string
	slow   time.Duration // the pause after each byte
	stay   bool          // do not close
	after  func(conn net.Conn)

	// By path, instead of script.
	scripts map[string]string

	mu       sync.Mutex
	ports    []string
	requests []*http.Request
	frames   []ws.Frame // what came after an upgrade, unmasked
	masked   bool       // all of them
	running  sync.WaitGroup
}

// Dial implements Target.
func (b *backend) Dial(_ context.Context, port string) (net.Conn, error) {
	client, server := net.Pipe()
	b.mu.Lock()
	b.ports = append(b.ports, port)
	b.mu.Unlock()
	b.running.Go(func() {
		defer server.Close()
		b.serve(server)
	})
	return client, nil
}

func (b *backend) serve(conn net.Conn) {
	br := bufio.NewReader(conn)
	r, err := http.ReadRequest(br)
	if err != nil {
		return
	}
	b.mu.Lock()
	b.requests = append(b.requests, r)
	b.mu.Unlock()
	script := b.script
	if b.scripts != nil {
		script = b.scripts[r.URL.Path]
	}
	script = strings.ReplaceAll(script, "{accept}", handshake.AcceptKey(r.Header.Get("Sec-Websocket-Key")))
	if b.slow == 0 {
		_, err = io.WriteString(conn, script)
	}
	for i := 0; b.slow > 0 && i < len(script) && err == nil; i++ {
		_, err = io.WriteString(conn, script[i:i+1])
		<-time.After(b.slow)
	}
	switch {
	case err != nil:
	case b.after != nil:
		b.after(conn)
	case b.stay:
		_, _ = io.Copy(io.Discard, br)
	case strings.HasPrefix(script, "HTTP/1.1 101") && strings.Contains(script, "\r\n\r\n"):
		b.readFrames(br)
	}
}

// readFrames reads up to a close frame.
func (b *backend) readFrames(r io.Reader) {
	b.masked = true
	for {
		f, err := readFrame(r)
		if err != nil {
			return
		}
		b.masked = b.masked && f.Header.Masked
		b.frames = append(b.frames, ws.UnmaskFrameInPlace(f))
		if f.Header.OpCode == ws.OpClose {
			return
		}
	}
}

// readFrame reads a frame of a control frame's size.
func readFrame(r io.Reader) (f ws.Frame, err error) {
	if f.Header, err = ws.ReadHeader(r); err != nil {
		return f, err
	}
	f.Payload = make([]byte, min(f.Header.Length, ws.MaxControlFramePayloadSize))
	_, err = io.ReadFull(r, f.Payload)
	return f, err
}

// try runs a probe against the backend with the default timeout, and returns when
// both are done.
func (b *backend) try(t *testing.T, p Probe) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), Timeout)
	defer cancel()
	err := p(ctx, Target{Dial: b.Dial, Host: "app:8080"})
	b.running.Wait()
	return err
}
