package sock

import (
	"context"
	"net"
	"testing"
	"time"
)

// watching is a call of Watch that is under way.
type watching struct {
	info   Info
	gone   bool
	over   chan struct{}
	cancel context.CancelFunc
}

func watch(t *testing.T, conn net.Conn) *watching {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	w := &watching{over: make(chan struct{}), cancel: cancel}
	go func() {
		defer close(w.over)
		w.info, w.gone = Watch(ctx, conn)
	}()
	t.Cleanup(func() { cancel(); <-w.over })
	return w
}

func (w *watching) want(t *testing.T, what string, ok func(Info, bool) bool) {
	t.Helper()
	select {
	case <-w.over:
	case <-time.After(10 * time.Second):
		t.Fatal("still waiting")
	}
	if !ok(w.info, w.gone) {
		t.Errorf("got %+v, %t; want %s", w.info, w.gone, what)
	}
}

// A peer that leaves is seen behind bytes that nobody reads, before and while it is
// watched, and the bytes stay.
func TestWatch(t *testing.T) {
	finished := func(i Info, gone bool) bool { return gone && i.Finished && !i.Reset && i.Unread == 5 }
	reset := func(i Info, gone bool) bool { return gone && i.Reset }
	for name, tt := range map[string]struct {
		leave func(far *net.TCPConn)
		want  func(Info, bool) bool
	}{
		"end":   {func(far *net.TCPConn) { _ = far.CloseWrite() }, finished},
		"reset": {func(far *net.TCPConn) { _ = far.SetLinger(0); _ = far.Close() }, reset},
	} {
		t.Run(name, func(t *testing.T) {
			near, far := tcpPair(t)
			w := watch(t, near)
			write(t, far, 2)
			await(t, near, "two bytes", func(i Info) bool { return i.Unread == 2 })
			write(t, far, 3)
			await(t, near, "five bytes", func(i Info) bool { return i.Unread == 5 })
			select {
			case <-w.over:
				t.Fatalf("got %+v, %t; want to wait for the end", w.info, w.gone)
			default:
			}
			tt.leave(far)
			w.want(t, name, tt.want)
		})
		t.Run(name+" before", func(t *testing.T) {
			near, far := tcpPair(t)
			write(t, far, 5)
			tt.leave(far)
			watch(t, near).want(t, name, tt.want)
		})
	}
}

// Whoever stops watching can read, and has no deadline.
func TestWatchIsStopped(t *testing.T) {
	near, far := tcpPair(t)
	w := watch(t, near)
	write(t, far, 1)
	await(t, near, "a byte", func(i Info) bool { return i.Unread == 1 })
	w.cancel()
	w.want(t, "nothing", func(_ Info, gone bool) bool { return !gone })
	one := make([]byte, 1)
	if n, err := near.Read(one); n != 1 || err != nil {
		t.Errorf("read: got %d, %v; want the byte", n, err)
	}
	_ = far.SetDeadline(time.Now().Add(10 * time.Second))
	again := watch(t, near) // would fail at once with a deadline left
	time.AfterFunc(50*time.Millisecond, func() { _ = far.CloseWrite() })
	again.want(t, "an end", func(i Info, gone bool) bool { return gone && i.Finished })
}

func TestWatchWhatIsNoSocket(t *testing.T) {
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	if info, gone := Watch(t.Context(), a); gone {
		t.Errorf("got %+v, want nothing known", info)
	}
	near, _ := tcpPair(t)
	_ = near.Close()
	if info, gone := Watch(t.Context(), near); gone {
		t.Errorf("closed here: got %+v, want nothing known", info)
	}
}
