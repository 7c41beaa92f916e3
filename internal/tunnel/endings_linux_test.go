// This file tests how tunnels end, over real sockets: what each peer sees, and how
// soon.

package tunnel

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
	"github.com/holdfast-proxy/caddy-holdfast/internal/sock"
)

func wantReset(t testing.TB, r io.Reader) {
	t.Helper()
	if n, err := io.Copy(io.Discard, r); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("got %d bytes, %v, want a reset", n, err)
	}
}

func breakOff(c peer) {
	_ = c.(*net.TCPConn).SetLinger(0)
	_ = c.Close()
}

// wantToldReset checks that either writing, which failed with err, or reading was
// told of a reset: the kernel tells only one. After a clean end it is neither.
func wantToldReset(t testing.TB, c net.Conn, err error) {
	t.Helper()
	_, readErr := c.Read(make([]byte, 1))
	if !errors.Is(err, syscall.ECONNRESET) && !errors.Is(readErr, syscall.ECONNRESET) {
		t.Errorf("got %v from writing, %v from reading, want a reset", err, readErr)
	}
}

// flood writes until that fails.
func flood(c net.Conn) error {
	b := make([]byte, 64<<10)
	for {
		if _, err := c.Write(b); err != nil {
			return err
		}
	}
}

// block writes to a leg whose other side is not read, until p waits for room, and
// everything has left the writer. It returns how
// much that was.
func block(t *testing.T, from net.Conn, p *pump) (size int) {
	t.Helper()
	b := make([]byte, 16<<10)
	for began := time.Now(); p.waiting.Load() == 0; size += len(b) {
		if _, err := from.Write(b); err != nil || time.Since(began) > testTimeout {
			t.Fatalf("got no pump that waits (%v), want the buffers full", err)
		}
		var left time.Time
		await(t, "what was written taken, or a pump that goes on waiting", func() bool {
			info, _ := sock.Ask(from)
			if info.Unacked == 0 && left.IsZero() {
				left = time.Now()
			}
			return !left.IsZero() && (p.waiting.Load() == 0 || time.Since(left) > 100*time.Millisecond)
		})
	}
	return size
}

func TestReset(t *testing.T) {
	for _, kind := range []struct {
		name string
		wrap func(net.Conn) net.Conn
	}{
		{"spliced", func(c net.Conn) net.Conn { return c }},
		{"copied", func(c net.Conn) net.Conn { return embeds{c} }},
	} {
		for side, name := range []string{"client", "backend"} {
			t.Run(kind.name+", by the "+name, func(t *testing.T) {
				nearClient, client := tcpPair(t)
				nearBackend, backend := tcpPair(t)
				r := start(t, Settings{}, kind.wrap(nearClient), kind.wrap(nearBackend), "")
				one, other := client, backend
				if side == 1 {
					one, other = backend, client
				}
				send(t, one, "last words")
				await(t, "the last words in the tunnel", func() bool {
					v := r.rec.View()
					return v.BytesIn+v.BytesOut == 10
				})
				breakOff(one)
				wantText(t, other, "last words")
				wantReset(t, other)
				r.wantEnd(time.Second, registry.Reset)
			})
			t.Run(kind.name+", by the "+name+" in the half-open state", func(t *testing.T) {
				nearClient, client := tcpPair(t)
				nearBackend, backend := tcpPair(t)
				r := start(t, Settings{}, kind.wrap(nearClient), kind.wrap(nearBackend), "")
				one, other := client, backend
				if side == 1 {
					one, other = backend, client
				}
				_ = one.CloseWrite()
				wantEOF(t, other)
				breakOff(one)
				r.wantEnd(soon, registry.Reset)
				// It has read the end of the one way; the other one is broken.
				if err := flood(other); !errors.Is(err, syscall.EPIPE) {
					t.Errorf("got %v, want it broken", err)
				}
			})
		}
	}
}

// One pump is given the error of a broken leg; what the other one sees then looks
// like an end, and must not be taken for one.
func TestResetIsNeverTakenForAnEnd(t *testing.T) {
	for range 200 {
		r, client, backend := tcpRig(t, Settings{}, "")
		flooded := make(chan error)
		go func() { flooded <- flood(client) }()
		_, _ = io.ReadFull(backend, make([]byte, 1+rand.IntN(300_000)))
		breakOff(backend)
		wantToldReset(t, client, <-flooded)
		r.wantEnd(soon, registry.Reset)
	}
}

func TestPeerThatLeavesWhileTheOtherDoesNotRead(t *testing.T) {
	t.Run("RST", func(t *testing.T) {
		r, client, _ := tcpRig(t, Settings{}, "")
		block(t, client, &r.tunnel.up)
		breakOff(client)
		r.wantEnd(soon, registry.Reset)
	})
	t.Run("FIN", func(t *testing.T) {
		r, client, backend := tcpRig(t, Settings{}, "")
		block(t, client, &r.tunnel.up)
		_ = client.CloseWrite()
		awaitState(t, r, registry.HalfOpen)
		_, _ = io.Copy(io.Discard, backend)
		_ = backend.Close()
		r.wantEnd(soon, registry.EOF)
	})
}

func awaitState(t *testing.T, r *rig, want registry.State) {
	t.Helper()
	for deadline := time.Now().Add(testTimeout); r.rec.State() != want; runtime.Gosched() {
		if time.Now().After(deadline) {
			t.Fatalf("got state %v, want %v", r.rec.State(), want)
		}
	}
}

// The user timeout ends a connection whose peer takes nothing, with the error of
// one whose peer is not there.
func TestDeadPeer(t *testing.T) {
	r, client, backend := tcpRig(t, Settings{Sockets: SocketOptions{UserTimeout: 300 * time.Millisecond}}, "")
	_ = backend.SetReadBuffer(4 << 10)
	flooded := make(chan error)
	go func() { flooded <- flood(client) }()
	r.wantEnd(testTimeout, registry.Dead)
	wantToldReset(t, client, <-flooded)
}

func TestReasons(t *testing.T) {
	for _, test := range []struct {
		err  error
		want registry.Reason
	}{
		{&net.OpError{Err: os.NewSyscallError("read", syscall.ETIMEDOUT)}, registry.Dead},
		{syscall.EHOSTUNREACH, registry.Dead},
		{syscall.ENETUNREACH, registry.Dead},
		{syscall.ECONNRESET, registry.Reset},
		{net.ErrClosed, registry.Reset},
		{nil, registry.Reset},
	} {
		if got := reasonOf(test.err); got != test.want {
			t.Errorf("%v: got %q, want %q", test.err, got, test.want)
		}
	}
}

// What has arrived when the end is decided is delivered, then both get a FIN.
func TestEndDecidedHereIsAnEndForBoth(t *testing.T) {
	for _, reason := range []registry.Reason{registry.Admin, registry.Shutdown, registry.Idle, registry.Orphan} {
		t.Run(string(reason), func(t *testing.T) {
			eachKind(t, Settings{}, "", func(t *testing.T, r *rig, client, backend peer) {
				const size = 100_000
				send(t, client, string(make([]byte, size)))
				wantText(t, backend, "\x00") // the rest is somewhere
				await(t, "everything in the tunnel", func() bool { return r.rec.View().BytesIn == size })
				r.rec.Close(registry.Ending{Reason: reason})
				wantEOF(t, client)
				_ = client.Close()
				if got, err := io.ReadAll(backend); len(got) != size-1 || err != nil {
					t.Errorf("got %d bytes, %v, want %d and the end", len(got), err, size-1)
				}
				_ = backend.Close()
				r.wantEnd(time.Second, reason)
			})
		})
	}
}

// A pump that waits for room has bytes behind it that nobody has read yet.
func TestEndDeliversWhatHasArrived(t *testing.T) {
	for _, kind := range kinds[:3] { // those where the test sees when bytes have arrived
		t.Run(kind.name, func(t *testing.T) {
			nearClient, nearBackend, client, backend := kind.legs(t)
			r := start(t, Settings{}, nearClient, nearBackend, "")
			size := block(t, client, &r.tunnel.up)
			r.rec.Close(registry.Ending{Reason: registry.Shutdown})
			if got, err := io.Copy(io.Discard, backend); int(got) != size || err != nil {
				t.Errorf("got %d bytes, %v, want %d and the end", got, err, size)
			}
			_, _ = client.Close(), backend.Close()
			r.wantEnd(soon, registry.Shutdown)
		})
	}
}

// A peer that goes on sending until it has read the end is not reset before: that
// would throw away what waits here until it has room.
func TestEndIsReadByAPeerThatSends(t *testing.T) {
	r, client, backend := tcpRig(t, Settings{}, "")
	const size = 200_000
	_ = client.SetReadBuffer(8 << 10)
	send(t, backend, string(make([]byte, size)))
	await(t, "bytes that the client's kernel has no room for", func() bool {
		info, _ := sock.Ask(r.tunnel.client.conn)
		return r.rec.View().BytesOut == size && info.Unsent > 0 && r.tunnel.down.waiting.Load() == 0
	})
	r.rec.Close(registry.Ending{Reason: registry.Lifetime})
	wantEOF(t, backend)
	_ = backend.Close()
	send(t, client, "another request")
	if got, err := io.Copy(io.Discard, client); got != size || err != nil {
		t.Errorf("got %d bytes, %v, want %d and the end", got, err, size)
	}
	_ = client.Close()
	r.wantEnd(soon, registry.Lifetime)
}

func TestEndOfPeersThatDoNotAnswer(t *testing.T) {
	// All at once, because each takes its seconds.
	silent, client, backend := tcpRig(t, Settings{}, "")
	blocked, writer, reader := tcpRig(t, Settings{}, "")
	block(t, writer, &blocked.tunnel.up)
	talking, one, other := tcpRig(t, Settings{}, "")
	go func() { _ = flood(one) }()
	go func() { _ = flood(other) }()
	wantText(t, one, "\x00")
	wantText(t, other, "\x00")
	for _, r := range []*rig{silent, blocked, talking} {
		r.rec.Close(registry.Ending{Reason: registry.Shutdown})
	}
	silent.wantEnd(soon, registry.Shutdown)
	wantEOF(t, client)
	wantEOF(t, backend)
	blocked.wantEnd(registry.ClosingTimeout+time.Second, registry.Shutdown)
	wantReset(t, reader) // it must not take what it has for all there is
	talking.wantEnd(time.Second, registry.Shutdown)
}

func TestEndBeforeRun(t *testing.T) {
	a, client := tcpPair(t)
	b, backend := tcpPair(t)
	r := prepare(t, registry.New(), Settings{}, a, b, "early")
	r.rec.Close(registry.Ending{Reason: registry.Admin})
	r.run()
	wantText(t, backend, "early")
	wantEOF(t, backend)
	wantEOF(t, client)
	r.wantEnd(soon, registry.Admin)
}

// Who decided the end has not got to telling the tunnel, which has found out by itself.
func TestResetThatIsToldLate(t *testing.T) {
	nearClient, client := tcpPair(t)
	nearBackend, backend := tcpPair(t)
	r := prepare(t, registry.New(), Settings{}, nearClient, nearBackend, "")
	r.late = make(chan struct{})
	r.run()
	decided := make(chan struct{})
	go func() { // ends when the tunnel is told
		defer close(decided)
		r.rec.Close(registry.Ending{Reason: registry.Reset})
	}()
	awaitState(t, r, registry.Closing)
	breakOff(client)
	send(t, backend, "x") // which nobody takes
	wantReset(t, backend)
	close(r.late)
	<-decided
	r.wantEnd(testTimeout, registry.Reset)
}

// After 1000 tunnels that ended in every way, many at once, nothing is left.
func TestBaselineAfterAllKindsOfEnds(t *testing.T) {
	ends := []func(r *rig, client, backend *net.TCPConn){
		func(_ *rig, c, b *net.TCPConn) { _, _ = c.Close(), b.Close() },
		func(_ *rig, c, b *net.TCPConn) { _, _ = c.CloseWrite(), b.CloseWrite() },
		func(_ *rig, c, _ *net.TCPConn) { breakOff(c) },
		func(_ *rig, _, b *net.TCPConn) { breakOff(b) },
		func(_ *rig, c, b *net.TCPConn) { breakOff(c); breakOff(b) },
		func(_ *rig, c, b *net.TCPConn) { go func() { _ = flood(c) }(); breakOff(b) },
		func(_ *rig, c, b *net.TCPConn) { go func() { _ = flood(b) }(); breakOff(c) },
		func(r *rig, _, _ *net.TCPConn) { r.rec.Close(registry.Ending{Reason: registry.Admin}) },
		func(r *rig, c, _ *net.TCPConn) {
			go func() { _ = flood(c) }()
			r.rec.Close(registry.Ending{Reason: registry.Orphan})
		},
		func(r *rig, _, _ *net.TCPConn) { r.tunnel.Abort() },
		func(r *rig, c, _ *net.TCPConn) { _ = c.CloseWrite(); r.tunnel.Abort() },
	}
	descriptors, goroutines := openFiles(t), runtime.NumGoroutine()
	reg := registry.New()
	for range 2 {
		var all sync.WaitGroup
		for i := range 500 {
			a, client := tcpPair(t)
			b, backend := tcpPair(t)
			r := prepare(t, reg, Settings{HalfOpenTimeout: time.Second}, a, b, "hello")
			r.run()
			all.Go(func() {
				_, _ = io.WriteString(client, "client")
				_, _ = io.WriteString(backend, "backend")
				ends[i%len(ends)](r, client, backend)
				<-r.done
				_, _ = client.Close(), backend.Close()
			})
		}
		all.Wait()
	}
	if got := reg.Len(); got != 0 {
		t.Errorf("got %d records, want none", got)
	}
	if got := pipes.made; got != 0 {
		t.Errorf("got %d pipes, want none", got)
	}
	for deadline := time.Now().Add(5 * time.Second); ; runtime.Gosched() {
		d, g := openFiles(t), runtime.NumGoroutine()
		if d <= descriptors && g <= goroutines {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("got %d descriptors and %d goroutines, want %d and %d", d, g, descriptors, goroutines)
		}
	}
}

func openFiles(t testing.TB) int {
	t.Helper()
	names, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(names)
}

func openPipes(t testing.TB) (n int) {
	t.Helper()
	names, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range names {
		if to, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%s", f.Name())); err == nil && len(to) > 5 && to[:5] == "pipe:" {
			n++
		}
	}
	return n
}
