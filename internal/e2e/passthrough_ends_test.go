// This file tests those limits of a tunnel's life that need real sockets, or real time:
// its clock is tested in fake time elsewhere.

package e2e

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"net"
	"sync"
	"testing"
	"time"
)

// What a limit ends is ended by a FIN, and told by its reason.
func TestPassthroughTimeLimits(t *testing.T) {
	mute := tcpBackend(t, func(conn net.Conn) { _, _ = io.Copy(io.Discard, struct{ io.Reader }{conn}) })
	talks := tcpBackend(t, trickle)
	echoes := echoBackend(t, nil)
	p, addr := startLayer4(t, "",
		toSNI("stuck.test", mute+" {\n stuck_timeout 1s\n}")+
			toSNI("answered.test", echoes+" {\n stuck_timeout 1s\n}")+
			toSNI("halfopen.test", talks+" {\n half_open_timeout 1s\n}")+
			toSNI("lifetime.test", echoes+" {\n max_lifetime 2s\n}"))
	before := p.stats(t).ClosedByReason
	began := time.Now()
	dial := func(name string) (c *net.TCPConn, hello []byte) {
		t.Helper()
		c, hello = dialTCP(t, addr), clientHello(t, name)
		if _, err := c.Write(hello); err != nil {
			t.Fatal(err)
		}
		return c, hello
	}
	answered, hello := dial("answered.test")
	wantBytes(t, answered, hello)
	stuck, _ := dial("stuck.test")
	halfOpen, _ := dial("halfopen.test")
	_ = halfOpen.CloseWrite()
	aged, _ := dial("lifetime.test")
	go trickle(aged)
	for _, end := range []struct {
		conn   *net.TCPConn
		reason string
		least  time.Duration
	}{
		{stuck, "stuck", time.Second},
		{halfOpen, "half_open", time.Second},
		{aged, "lifetime", 1800 * time.Millisecond},
	} {
		if _, err := io.Copy(io.Discard, struct{ io.Reader }{end.conn}); err != nil {
			t.Errorf("%s: got %v, want a FIN", end.reason, err)
		}
		if took := time.Since(began); took < end.least {
			t.Errorf("%s: got the end after %v, want at least %v", end.reason, took, end.least)
		}
		end.conn.Close()
		p.waitReason(t, end.reason, before[end.reason], 1)
	}
	wantEcho(t, answered, "still")
	answered.Close()
}

// trickle sends until that fails.
func trickle(conn net.Conn) {
	for {
		if _, err := conn.Write([]byte("x")); err != nil {
			return
		}
		pass(20 * time.Millisecond)
	}
}

// A peer that lives and does not read is not taken for dead, however long that is, unless
// tcp_user_timeout says so. It gets everything in the end.
func TestPassthroughPeerThatDoesNotRead(t *testing.T) {
	sent := bytes.Repeat([]byte("0123456789abcdef"), 2<<20) // more than there is room for
	wake := make(chan struct{})                             // closed when the peers read at last
	digests := make(chan [32]byte, 2)
	wakeAll := sync.OnceFunc(func() { close(wake) })
	defer wakeAll()
	floods := tcpBackend(t, func(conn net.Conn) { _ = flood(conn, sent) })
	sleeps := tcpBackend(t, func(conn net.Conn) {
		_ = conn.SetDeadline(time.Now().Add(5 * time.Minute))
		<-wake
		digests <- digest(conn)
	})
	dies := tcpBackend(t, func(net.Conn) { <-wake })
	var servers string
	var addrs []string
	for _, settings := range []string{floods + " {\n", sleeps + " {\n", floods + " {\n tcp_user_timeout 2s\n", dies + " {\n tcp_user_timeout 2s\n"} {
		addrs = append(addrs, freeAddr(t))
		servers += fmt.Sprintf("%s {\n%s}\n", addrs[len(addrs)-1], toAll(settings+" tcp_keepalive 1s 1s 2\n}"))
	}
	p := startCaddy(t, "layer4 {\n"+servers+"}", "respond ok")
	before := p.stats(t).ClosedByReason["dead"]
	var clients []*net.TCPConn
	for i, addr := range addrs {
		c := dialTCP(t, addr)
		_ = c.SetReadBuffer(64 << 10)
		_ = c.SetDeadline(time.Now().Add(5 * time.Minute))
		if i%2 == 1 { // else the backend floods
			go func() { _ = flood(c, sent) }()
		}
		clients = append(clients, c)
	}
	p.waitReason(t, "dead", before, 2)
	wantIdle := func(least float64) {
		t.Helper()
		var got []connection
		if !eventually(20*time.Second, func() bool {
			got = p.connections(t)
			return len(got) != 2 || got[0].Idle >= least && got[1].Idle >= least
		}) || len(got) != 2 || got[0].State != "open" || got[1].State != "open" {
			t.Fatalf("connections: got %+v, want two that are open and idle for %vs", got, least)
		}
	}
	wantIdle(1)
	silence := long(10*time.Second, time.Minute)
	pass(silence)
	wantIdle(silence.Seconds())
	wakeAll()
	digests <- digest(clients[0])
	for range 2 {
		if <-digests != sha256.Sum256(sent) {
			t.Error("got other bytes than were sent")
		}
	}
	hangUp(clients)
}

// flood sends all of b, and ends.
func flood(conn net.Conn, b []byte) error {
	c := conn.(*net.TCPConn)
	_ = c.SetWriteBuffer(64 << 10)
	_ = c.SetDeadline(time.Now().Add(5 * time.Minute))
	if _, err := c.Write(b); err != nil {
		return err
	}
	return c.CloseWrite()
}

func digest(r io.Reader) [32]byte {
	h := sha256.New()
	_, _ = io.Copy(h, struct{ io.Reader }{r})
	return [32]byte(h.Sum(nil))
}
