// This file tests upstreams of sni_passthrough that cannot be had, or say nothing, each
// by hundreds of clients.

package e2e

import (
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime"
	"slices"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// callers is how many clients come at once.
const callers = 500

// A queue of connections that nobody accepts leaves SYNs unanswered.
func TestPassthroughFullQueue(t *testing.T) { testUnreachable(t, fullBacklog(t), 2*time.Second) }

func TestPassthroughRefused(t *testing.T) { testUnreachable(t, freeAddr(t), 0) }

// testUnreachable has clients ask for an upstream to which no connection can be had. It
// is given up when dial_timeout is over, or at once if that is 0; the next one gets the
// whole ClientHello. If there is none the clients are closed.
func testUnreachable(t *testing.T, bad string, dialTimeout time.Duration) {
	good := echoBackend(t, nil)
	settings := " {\n lb_policy first\n"
	if dialTimeout > 0 {
		settings += fmt.Sprintf(" dial_timeout %s\n", dialTimeout)
	}
	p, addr := startLayer4(t, "metrics", toSNI("next.test", bad+" "+good+settings+"}")+toSNI("alone.test", bad+settings+" name alone\n}"))
	t.Run("next", func(t *testing.T) {
		back := p.baseline(t)
		began := time.Now()
		hello := clientHello(t, "next.test")
		conns := call(t, addr, hello)
		for i, c := range conns {
			wantBytes(t, c, hello)
			if i == 0 {
				wantAfter(t, began, dialTimeout)
			}
		}
		t.Logf("%d clients have their answers after %v", callers, time.Since(began))
		if got := p.stats(t).ByUpstream; got[good] != callers || got[bad] != 0 {
			t.Errorf("upstreams: got %v, want all %d at %s", got, callers, good)
		}
		hangUp(conns)
		back()
	})
	t.Run("alone", func(t *testing.T) {
		back := p.baseline(t)
		before := p.value(t, refusedDials("alone"))
		began := time.Now()
		conns := call(t, addr, clientHello(t, "alone.test"))
		for i, c := range conns {
			wantEnd(t, c)
			if i == 0 {
				wantAfter(t, began, dialTimeout)
			}
		}
		t.Logf("%d clients are closed after %v", callers, time.Since(began))
		if got := p.value(t, refusedDials("alone")) - before; got != callers {
			t.Errorf("refused: got %v, want %d", got, callers)
		}
		hangUp(conns)
		back()
	})
}

// An upstream that accepts and says nothing has accepted: the tunnel stands until the
// client ends it, or nothing has passed for too long.
func TestPassthroughSilentUpstream(t *testing.T) {
	hello := clientHello(t, "silent.test")
	var whole atomic.Int32
	backend := tcpBackend(t, func(conn net.Conn) {
		got := make([]byte, len(hello))
		if _, err := io.ReadFull(conn, got); err == nil && bytes.Equal(got, hello) {
			whole.Add(1)
		}
		_, _ = conn.Read(got) // until the end
	})
	route := func(more string) string { return toSNI("silent.test", backend+" {\n dial_timeout 2s\n"+more+"}") }
	p, addr := startLayer4(t, "", route(""))
	back := p.baseline(t)
	before := p.stats(t).ClosedByReason
	conns := call(t, addr, hello)
	if !eventually(20*time.Second, func() bool { return p.stats(t).ByState["open"] == callers && whole.Load() == callers }) {
		t.Fatalf("states: got %v and %d whole ClientHellos, want %d open", p.stats(t).ByState, whole.Load(), callers)
	}
	pass(2500 * time.Millisecond) // longer than a dial may take
	if got := p.stats(t).ByState["open"]; got != callers {
		t.Errorf("open: got %d, want all %d", got, callers)
	}
	hangUp(conns[:callers/2])
	p.waitReason(t, "eof", before["eof"], callers/2)
	p.reload(t, p.layer4Config(addr, "", route(" keep_alive_treatment standard\n inactivity_timeout 1s\n inactivity_grace 0\n")))
	for _, c := range conns[callers/2:] {
		if n, err := c.Read(make([]byte, 1)); n > 0 || err != io.EOF {
			t.Fatalf("got %d bytes, %v; want a FIN", n, err)
		}
	}
	p.waitReason(t, "idle", before["idle"], callers/2)
	hangUp(conns)
	back()
}

// An upstream that resets what it has just accepted was reached; its reset is passed on.
// One that is faster than the dial was not.
func TestPassthroughResettingUpstream(t *testing.T) {
	backend := tcpBackend(t, func(conn net.Conn) { _ = conn.(*net.TCPConn).SetLinger(0) })
	p, addr := startLayer4(t, "metrics", toSNI("resets.test", backend+" {\n name resets\n}"))
	back := p.baseline(t)
	before, dialsBefore := p.stats(t).ClosedByReason["reset"], p.value(t, refusedDials("resets"))
	conns := call(t, addr, clientHello(t, "resets.test"))
	resets := 0
	for _, c := range conns {
		n, err := c.Read(make([]byte, 1))
		switch {
		case n == 0 && errors.Is(err, syscall.ECONNRESET):
			resets++
		case n > 0 || err != io.EOF:
			t.Errorf("got %d bytes, %v; want the connection closed", n, err)
		}
	}
	p.waitEmpty(t)
	reset, dial := p.stats(t).ClosedByReason["reset"]-before, int(p.value(t, refusedDials("resets"))-dialsBefore)
	t.Logf("%d resets passed on, %d failed dials", reset, dial)
	if reset+dial != callers || resets != reset {
		t.Errorf("got %d closed as reset, %d as dial, and %d resets; want %d in all, and a reset for each of the former", reset, dial, resets, callers)
	}
	hangUp(conns)
	back()
}

// lb_retries says how many more upstreams are tried.
func TestPassthroughRetries(t *testing.T) {
	good := echoBackend(t, nil)
	all := freeAddr(t) + " " + freeAddr(t) + " " + good
	var routes string
	for n := range 4 {
		routes += toSNI(fmt.Sprintf("retries%d.test", n), fmt.Sprintf("%s {\n lb_policy first\n lb_retries %d\n}", all, n))
	}
	_, addr := startLayer4(t, "", routes)
	for n := range 4 {
		hello := clientHello(t, fmt.Sprintf("retries%d.test", n))
		c := dialTCP(t, addr)
		_, _ = c.Write(hello)
		if n < 2 {
			wantEnd(t, c)
		} else {
			wantBytes(t, c, hello)
		}
		c.Close()
	}
}

// With lb_try_duration clients wait for an upstream that is not there yet, which gets all
// that they have sent. One that does not come in time is given up.
func TestPassthroughTryDuration(t *testing.T) {
	later, never := freeAddr(t), freeAddr(t)
	p, addr := startLayer4(t, "",
		toSNI("later.test", later+" {\n lb_try_duration 1m\n lb_try_interval 20ms\n}")+
			toSNI("never.test", never+" {\n lb_try_duration 500ms\n lb_try_interval 20ms\n}"))
	hello := clientHello(t, "later.test")
	waiting := dialTCP(t, addr)
	_, _ = waiting.Write(hello)
	began := time.Now()
	vain := dialTCP(t, addr)
	_, _ = vain.Write(clientHello(t, "never.test"))
	wantEnd(t, vain)
	if took := time.Since(began); took < 450*time.Millisecond {
		t.Errorf("got closed after %v, want a wait of 500ms", took)
	}
	if got := p.stats(t).ByState["connecting"]; got != 1 {
		t.Errorf("connecting: got %d, want the other client", got)
	}
	_, _ = io.WriteString(waiting, "and more")
	ln, err := net.Listen("tcp", later)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	t.Cleanup(func() { ln.Close(); <-done })
	go acceptTCP(ln, echo, done)
	wantBytes(t, waiting, append(hello, "and more"...))
	waiting.Close()
}

// wantAfter wants that the first of many has waited for as long as a dial may take; at the
// most, what a busy machine adds.
func wantAfter(t testing.TB, began time.Time, dialTimeout time.Duration) {
	t.Helper()
	if took := time.Since(began); took < dialTimeout || took > dialTimeout+20*time.Second {
		t.Errorf("got an end of the dial after %v, want it after %v", took, dialTimeout)
	}
}

// refusedDials counts the clients of a route for which no upstream could be connected to.
func refusedDials(route string) string {
	return `caddy_connections_refused_total{kind="passthrough",reason="dial",route="` + route + `"}`
}

// clientHello is the first flight of a TLS client that asks for a name.
func clientHello(t testing.TB, name string) []byte {
	t.Helper()
	near, far := net.Pipe()
	defer near.Close()
	defer far.Close()
	_ = far.SetDeadline(time.Now().Add(10 * time.Second))
	go func() { _ = tls.Client(near, &tls.Config{ServerName: name}).Handshake() }() // ends with the pipe
	b := make([]byte, 16<<10)
	n, err := far.Read(b)
	if err != nil {
		t.Fatal(err)
	}
	return slices.Clip(b[:n])
}

// call connects clients that send a ClientHello.
func call(t testing.TB, addr string, hello []byte) (conns []*net.TCPConn) {
	t.Helper()
	for range callers {
		c := dialTCP(t, addr)
		_ = c.SetDeadline(time.Now().Add(time.Minute))
		if _, err := c.Write(hello); err != nil {
			t.Fatal(err)
		}
		conns = append(conns, c)
	}
	return conns
}

func hangUp(conns []*net.TCPConn) {
	for _, c := range conns {
		c.Close()
	}
}

// wantBytes wants to read exactly that.
func wantBytes(t testing.TB, conn net.Conn, want []byte) {
	t.Helper()
	got := make([]byte, len(want))
	if n, err := io.ReadFull(conn, got); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("got %d bytes, %v; want the %d that were sent", n, err, len(want))
	}
}

// baseline returns a check that with its clients gone, while Caddy runs, there are no more
// goroutines and descriptors than now, and nothing is in the registry.
func (p *proxy) baseline(t testing.TB) (back func()) {
	t.Helper()
	p.waitEmpty(t)
	goroutines, descriptors := runtime.NumGoroutine(), len(openDescriptors(t))
	return func() {
		t.Helper()
		p.waitEmpty(t)
		var g, d int
		if !eventually(20*time.Second, func() bool {
			g, d = runtime.NumGoroutine(), len(openDescriptors(t))
			return g <= goroutines+few && d <= descriptors+few
		}) {
			t.Errorf("got %d goroutines and %d descriptors, want no more than before: %d and %d", g, d, goroutines, descriptors)
		}
	}
}

// few are those of requests to the admin endpoint, which come and go.
const few = 8
