// This file tests those limits of a tunnel's life that need real sockets, or real time:
// its clock is tested in fake time elsewhere.

package e2e

import (
	"crypto/sha256"
	"fmt"
	"io"
	"net"
	"strings"
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
	wantBytes(t, halfOpen, []byte("x")) // one that ends while a backend is dialed is gone
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
	wake := make(chan struct{}) // closed when the peers read at last
	wakeAll := sync.OnceFunc(func() { close(wake) })
	defer wakeAll()
	sent, got := make(chan [32]byte, 4), make(chan [32]byte, 4)
	floods := tcpBackend(t, func(conn net.Conn) { sent <- flood(conn, wake) })
	sleeps := tcpBackend(t, func(conn net.Conn) { <-wake; got <- digest(conn) })
	var servers strings.Builder
	var addrs []string
	for _, more := range []string{"", " tcp_user_timeout 2s\n"} {
		for _, backend := range []string{floods, sleeps} {
			addr := freeAddr(t)
			addrs = append(addrs, addr)
			fmt.Fprintf(&servers, "%s {\n%s}\n", addr, toAll(backend+" {\n tcp_keepalive 1s 1s 2\n"+more+"}"))
		}
	}
	p := startCaddy(t, "layer4 {\n"+servers.String()+"}", "respond ok")
	before := p.stats(t).ClosedByReason["dead"]
	var clients []*net.TCPConn
	for i, addr := range addrs {
		c := dialTCP(t, addr)
		if i%2 == 1 { // else the backend floods
			go func() { sent <- flood(c, wake) }()
		}
		clients = append(clients, c)
	}
	p.waitReason(t, "dead", before, 2)
	<-sent // by those that were cut
	<-sent
	wantIdle := func(least float64) {
		t.Helper()
		var all []connection
		if !eventually(20*time.Second, func() bool {
			all = p.connections(t)
			return len(all) != 2 || all[0].Idle >= least && all[1].Idle >= least
		}) || len(all) != 2 || all[0].State != "open" || all[1].State != "open" {
			t.Fatalf("connections: got %+v, want two that are open and idle for %vs", all, least)
		}
	}
	wantIdle(1)
	silence := long(10*time.Second, time.Minute)
	pass(silence)
	wantIdle(silence.Seconds())
	wakeAll()
	// One of the backends has the torso of what was sent by a client that was cut.
	arrived := map[[32]byte]bool{digest(clients[0]): true, <-got: true, <-got: true}
	for range 2 {
		if !arrived[<-sent] {
			t.Error("got other bytes than were sent")
		}
	}
	hangUp(clients)
}

// flood sends until it is told to end, or cannot go on, and returns the digest of what it
// has sent. There is no end of the room that a kernel may have.
func flood(conn net.Conn, until <-chan struct{}) [32]byte {
	c := conn.(*net.TCPConn)
	_ = c.SetDeadline(time.Now().Add(5 * time.Minute))
	h, chunk := sha256.New(), make([]byte, 64<<10)
	for i := 0; ; i++ {
		select {
		case <-until:
			_ = c.CloseWrite()
			return [32]byte(h.Sum(nil))
		default:
		}
		copy(chunk, fmt.Sprintf("%020d", i))
		n, err := c.Write(chunk)
		_, _ = h.Write(chunk[:n])
		if err != nil {
			return [32]byte(h.Sum(nil))
		}
	}
}

func digest(conn net.Conn) [32]byte {
	_ = conn.SetDeadline(time.Now().Add(5 * time.Minute))
	h := sha256.New()
	_, _ = io.Copy(h, struct{ io.Reader }{conn})
	return [32]byte(h.Sum(nil))
}
