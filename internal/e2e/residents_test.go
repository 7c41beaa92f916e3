// This file is clients of both handlers that chat through reloads.

package e2e

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gobwas/ws"

	"github.com/holdfast-proxy/caddy-holdfast/internal/frame"
)

// join lets n clients in at a path, and as many through each door.
func (h *house) join(t testing.TB, n int, path string, doors ...string) (all []*resident) {
	t.Helper()
	for range n {
		if path != "" {
			all = append(all, h.enter(t, path))
		}
		for _, door := range doors {
			all = append(all, h.pass(t, door))
		}
	}
	return all
}

// enter lets a client of a WebSocket route in.
func (h *house) enter(t testing.TB, path string) *resident {
	t.Helper()
	return enterAt(t, h.addr, path)
}

func enterAt(t testing.TB, addr, path string) *resident {
	t.Helper()
	status, c := knock(t, addr, path)
	if status != http.StatusSwitchingProtocols {
		t.Fatalf("%s: got status %d, want 101", path, status)
	}
	return settle(t, &resident{conn: c, speak: c.speak, leave: c.bye})
}

// knock asks for a WebSocket. The server of a config that was replaced may take the
// connection and close it, before it has read the request.
func knock(t testing.TB, addr, path string) (status int, c *rawConn) {
	t.Helper()
	var err error
	if !eventually(20*time.Second, func() bool {
		var res *http.Response
		if res, c, err = ask("", addr, upgradeTo(path, "Host: "+addr)); err == nil {
			status = res.StatusCode
		}
		return err == nil
	}) {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return status, c
}

// pass lets a client of a layer4 route in.
func (h *house) pass(t testing.TB, door string) *resident {
	t.Helper()
	c := dialTCP(t, door)
	return settle(t, &resident{conn: c, speak: func(text string) error { return speak(c, text) }, leave: c.CloseWrite})
}

// resident is a client of either handler that sends numbered messages, wants each back,
// once and in order, and has nothing against a pause.
type resident struct {
	conn   net.Conn
	speak  func(text string) error
	leave  func() error
	echoed atomic.Int64
	quit   chan struct{} // closed by finish
	done   chan struct{} // closed by run
	end    error         // valid after done; nil if it left by itself
	ended  time.Time     // valid after done
}

// closing is how a resident was closed by the proxy; the code is 0 for tunnels.
type closing struct{ code uint16 }

func (c closing) Error() string { return fmt.Sprintf("closed by the proxy: code %d", c.code) }

// settle starts a resident and returns when it had its first echo.
func settle(t testing.TB, r *resident) *resident {
	t.Helper()
	r.quit, r.done = make(chan struct{}), make(chan struct{})
	_ = r.conn.SetDeadline(time.Now().Add(5 * time.Minute))
	go r.run()
	t.Cleanup(func() { r.conn.Close(); <-r.done })
	if !eventually(20*time.Second, func() bool { return r.echoed.Load() > 0 || r.over() }) || r.over() {
		r.conn.Close()
		<-r.done
		t.Fatalf("a new client gets no echo: %v", r.end)
	}
	return r
}

// run chats until quit or the end of the connection.
func (r *resident) run() {
	defer close(r.done)
	defer func() { r.ended = time.Now() }()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-r.quit:
			r.end = r.leave()
			return
		default:
		}
		if r.end = r.speak(fmt.Sprintf("message %6d", r.echoed.Load())); r.end != nil {
			return
		}
		r.echoed.Add(1)
		<-tick.C
	}
}

// speak sends a message and wants it back. A close frame is answered.
func (c *rawConn) speak(text string) error {
	if _, err := c.Write(frame.Append(nil, ws.OpText, []byte(text), true)); err != nil {
		return err
	}
	h, got, err := c.receiveData()
	if err != nil {
		return err
	}
	if h.OpCode == ws.OpClose && len(got) >= 2 {
		code := uint16(got[0])<<8 | uint16(got[1])
		_, _ = c.Write(frame.AppendClose(nil, code, "", true))
		return closing{code}
	}
	if h.OpCode != ws.OpText || got != text {
		return fmt.Errorf("got %v %q, want an echo of %q", h.OpCode, got, text)
	}
	return nil
}

// receiveData is receive, and answers the pings that come before.
func (c *rawConn) receiveData() (h ws.Header, payload string, err error) {
	for {
		if h, payload, err = c.receive(); err != nil || h.OpCode != ws.OpPing {
			return h, payload, err
		}
		if _, err = c.Write(frame.Append(nil, ws.OpPong, []byte(payload), c.client)); err != nil {
			return h, payload, err
		}
	}
}

// bye closes in good order.
func (c *rawConn) bye() error {
	if _, err := c.Write(frame.AppendClose(nil, 1000, "", true)); err != nil {
		return err
	}
	h, got, err := c.receiveData()
	if err == nil && (h.OpCode != ws.OpClose || got != "\x03\xe8") {
		err = fmt.Errorf("got %v %q, want the echo of 1000", h.OpCode, got)
	}
	return err
}

// speak sends bytes and wants them back.
func speak(c *net.TCPConn, text string) error {
	got := make([]byte, len(text))
	_, err := io.WriteString(c, text)
	if err == nil {
		_, err = io.ReadFull(c, got)
	}
	switch timeout, ok := err.(net.Error); {
	case ok && timeout.Timeout():
		return err
	case err != nil:
		return closing{}
	case string(got) != text:
		return fmt.Errorf("got %q, want an echo of %q", got, text)
	}
	return nil
}

// wantChatting wants that each resident gets echoes from now on.
func wantChatting(t testing.TB, all ...*resident) {
	t.Helper()
	before := make([]int64, len(all))
	for i, r := range all {
		before[i] = r.echoed.Load()
	}
	deadline := time.Now().Add(20 * time.Second)
	for i, r := range all {
		// What was sent before may still be echoed.
		eventually(time.Until(deadline), func() bool { return r.echoed.Load() > before[i]+1 || r.over() })
		if r.over() {
			t.Errorf("client %d of %d: %v after %d echoes", i, len(all), r.end, r.echoed.Load())
		} else if r.echoed.Load() <= before[i]+1 {
			t.Errorf("client %d of %d: it gets no echo", i, len(all))
		}
	}
}

func (r *resident) over() bool {
	select {
	case <-r.done:
		return true
	default:
		return false
	}
}

// wantClosed wants that residents are closed with a code, spread over a window that did
// not begin before a time. A window of zero says nothing of when.
func wantClosed(t testing.TB, code uint16, from time.Time, window time.Duration, all ...*resident) {
	t.Helper()
	ended := make([]time.Time, 0, len(all))
	deadline := time.Now().Add(window + 20*time.Second)
	for i, r := range all {
		if !eventually(time.Until(deadline), r.over) {
			t.Errorf("client %d of %d is not closed", i, len(all))
			continue
		}
		if r.end != (closing{code}) {
			t.Errorf("client %d of %d: got %v, want it closed with code %d", i, len(all), r.end, code)
		}
		ended = append(ended, r.ended)
	}
	if window > 0 {
		wantPaced(t, ended, from, window)
	}
}

// wantOut is wantClosed of residents who came in pairs: a WebSocket, a tunnel.
func wantOut(t testing.TB, from time.Time, window time.Duration, all ...*resident) {
	t.Helper()
	var webSockets, tunnels []*resident
	for i := 0; i < len(all); i += 2 {
		webSockets, tunnels = append(webSockets, all[i]), append(tunnels, all[i+1])
	}
	wantClosed(t, 1001, from, window, webSockets...)
	wantClosed(t, 0, from, window, tunnels...)
}

// finish lets residents leave and wants that nothing was wrong.
func finish(t testing.TB, all ...*resident) {
	t.Helper()
	for _, r := range all {
		close(r.quit)
	}
	for i, r := range all {
		<-r.done
		if r.end != nil {
			t.Errorf("client %d of %d, after %d echoes: %v", i, len(all), r.echoed.Load(), r.end)
		}
		if c, ok := r.conn.(*net.TCPConn); ok {
			_, _ = io.Copy(io.Discard, c) // the answer to its FIN
		}
		r.conn.Close()
	}
}
