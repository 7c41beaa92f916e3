// This file tests clients, and decisions, that come at the instant at which an upstream
// accepts: over real sockets, since that is where something could be left open.

package opening

import (
	"context"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/zap"

	"github.com/holdfast-proxy/caddy-holdfast/internal/pool"
	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
	"github.com/holdfast-proxy/caddy-holdfast/internal/tunnel"
)

// tunnels is a route of tunnels without limits.
type tunnels struct{}

func (tunnels) Settings() *tunnel.Settings             { return new(tunnel.Settings) }
func (tunnels) Inactive(*registry.Conn, time.Duration) {}

// doors are a client's listener and a backend's.
type doors struct {
	client, backend net.Listener
	serving         sync.WaitGroup
	open, accepted  atomic.Int64 // connections that the backend has, and has had
}

func openDoors(t *testing.T) *doors {
	t.Helper()
	d := new(doors)
	for _, ln := range []*net.Listener{&d.client, &d.backend} {
		var err error
		if *ln, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
			t.Fatal(err)
		}
	}
	d.serving.Go(d.accept)
	t.Cleanup(func() {
		d.client.Close()
		d.backend.Close()
		d.serving.Wait()
	})
	return d
}

// accept owns the backend; closing its listener ends it. A connection that nobody
// closes is open for as long as the test looks.
func (d *doors) accept() {
	for {
		conn, err := d.backend.Accept()
		if err != nil {
			return
		}
		d.open.Add(1)
		d.accepted.Add(1)
		d.serving.Go(func() {
			_ = conn.SetDeadline(time.Now().Add(60 * time.Second))
			_, _ = io.Copy(io.Discard, struct{ io.Reader }{conn})
			conn.Close()
			d.open.Add(-1)
		})
	}
}

// pair returns both ends of a client's connection.
func (d *doors) pair(t *testing.T) (far, near *net.TCPConn) {
	t.Helper()
	c, err := net.Dial("tcp", d.client.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	s, err := d.client.Accept()
	if err != nil {
		t.Fatal(err)
	}
	if s.RemoteAddr().String() != c.LocalAddr().String() {
		t.Fatal("got another client's connection")
	}
	return c.(*net.TCPConn), s.(*net.TCPConn)
}

// leavings are what ends a connection: its client, or a decision made here.
var leavings = []func(far *net.TCPConn, o *Opening){
	func(far *net.TCPConn, _ *Opening) { far.Close() },
	func(far *net.TCPConn, _ *Opening) { _ = far.SetLinger(0); far.Close() },
	func(far *net.TCPConn, _ *Opening) { _, _ = io.WriteString(far, "hello"); far.Close() },
	func(far *net.TCPConn, o *Opening) { o.Fail(registry.Admin); far.Close() },
	func(far *net.TCPConn, o *Opening) { o.Fail(registry.Shutdown); _ = far.SetLinger(0); far.Close() },
	func(far *net.TCPConn, o *Opening) {
		o.Record().Close(registry.Ending{Reason: registry.Admin})
		far.Close()
	},
}

// C8, C9, C42: 10 000 clients that leave, or are ended, within 2 ms of the moment at
// which the upstream accepts: every dialed connection is closed, and no record, place, descriptor or goroutine is left.
func TestClientLeavesAsTheUpstreamAccepts(t *testing.T) {
	const clients, parallel = 10000, 400
	d := openDoors(t)
	files, goroutines := openFiles(t), runtime.NumGoroutine()
	reg := registry.New()
	route := reg.Retain(registry.Passthrough, "route")
	addr, err := pool.ParsePlainAddress(d.backend.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	config := func(random *rand.Rand) Config {
		delay := time.Duration(random.IntN(2000)) * time.Microsecond
		tried := false
		return Config{
			Next: func(context.Context) *pool.Target {
				if tried {
					return nil
				}
				tried = true
				place := route.Choose(func(func(string) registry.Load) string { return addr.Name })
				return &pool.Target{Place: place, Addr: addr, Dial: func(ctx context.Context) (net.Conn, error) {
					// Before it is dialed, after that, or without asking whether it is still wanted.
					kind := random.IntN(3)
					switch kind {
					case 0:
						pause(delay)
					case 2:
						ctx = context.WithoutCancel(ctx)
					}
					conn, err := new(net.Dialer).DialContext(ctx, "tcp", addr.Dial())
					if kind > 0 {
						pause(delay)
					}
					return conn, err
				}}
			},
			Tried:       func(*pool.Target, time.Duration, error) {},
			DialTimeout: time.Minute,
			Logger:      zap.NewNop(),
		}
	}
	var opened, failed atomic.Int64
	one := func(far, near *net.TCPConn, random *rand.Rand) {
		o := New(context.Background())
		if err := o.Admit(reg, route, registry.Info{Kind: registry.Passthrough, Client: "192.0.2.1"}); err != nil {
			t.Error(err)
			return
		}
		leave, after := leavings[random.IntN(len(leavings))], time.Duration(random.IntN(2000))*time.Microsecond
		c := config(rand.New(rand.NewPCG(random.Uint64(), 2)))
		var left sync.WaitGroup
		left.Go(func() { pause(after); leave(far, o) })
		defer left.Wait()
		backend, err := o.Connect(c, near)
		if err != nil {
			failed.Add(1)
			o.Fail(registry.Dial)
			o.Close()
			near.Close()
			return
		}
		if tun := o.Tunnel(tunnels{}, near, backend, []byte("early")); tun != nil {
			opened.Add(1)
			tun.Run()
			return
		}
		failed.Add(1)
		near.Close()
		o.Close()
	}
	pairs := make(chan [2]*net.TCPConn) // closed below, when all have been given out
	var all sync.WaitGroup
	for worker := range parallel {
		all.Go(func() {
			random := rand.New(rand.NewPCG(1, uint64(worker)))
			for p := range pairs {
				one(p[0], p[1], random)
			}
		})
	}
	for range clients {
		far, near := d.pair(t)
		pairs <- [2]*net.TCPConn{far, near}
	}
	close(pairs)
	all.Wait()
	t.Logf("%d became tunnels, %d did not; the backend had %d connections", opened.Load(), failed.Load(), d.accepted.Load())
	if opened.Load() < clients/50 || failed.Load() < clients/50 {
		t.Errorf("got %d tunnels and %d failures, want many of both for the test to mean something", opened.Load(), failed.Load())
	}
	if got := reg.Len(); got != 0 {
		t.Errorf("got %d records, want none", got)
	}
	if places := (&testPool{route: route}).places(addr.Name); places != 0 {
		t.Errorf("got %d places taken, want none", places)
	}
	if !eventually(func() bool { return d.open.Load() == 0 }) {
		t.Errorf("got %d connections of the backend left open, want none", d.open.Load())
	}
	if !eventually(func() bool { return runtime.NumGoroutine() <= goroutines }) {
		t.Errorf("got %d goroutines, want %d", runtime.NumGoroutine(), goroutines)
	}
	if !eventually(func() bool { return openFiles(t) <= files }) {
		t.Errorf("got %d descriptors, want %d", openFiles(t), files)
	}
}

// pause waits; timers are as exact as the machine is free.
func pause(d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	<-timer.C
}

// openFiles returns how many descriptors the process has, but for the poller's.
func openFiles(t *testing.T) (n int) {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if to, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil && !strings.HasPrefix(to, "anon_inode:[event") {
			n++
		}
	}
	return n
}
