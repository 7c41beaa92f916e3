// This file is clients that chat all the time and miss no echo, and what backends must
// have got of them.

package e2e

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/coder/websocket"
)

// talker is a client that sends numbered messages without waiting for their echoes,
// and wants each echo once and in order.
type talker struct {
	id      int
	ctx     context.Context
	conn    *websocket.Conn
	quiet   bool          // it wants no echoes
	pause   time.Duration // between messages, and up to one and a half times as much more
	sent    atomic.Int64
	echoed  atomic.Int64
	quit    chan struct{} // closed by finish
	sending chan struct{} // closed by send
	closing atomic.Bool   // it ends as finish wants
	over    chan struct{} // closed by read
	fault   string        // valid after over
	end     ending        // valid after over; zero if finish closed it
}

// startTalkers connects clients to backends that echo.
func startTalkers(t testing.TB, p *proxy, n int) []*talker {
	t.Helper()
	all := make([]*talker, n)
	for i := range n {
		all[i] = dialTalker(t, p, i, "/?echo=1")
	}
	for _, k := range all {
		k.start()
	}
	return all
}

// startTalker connects a client. Without echo in the target it wants none.
func startTalker(t testing.TB, p *proxy, id int, target string) *talker {
	t.Helper()
	k := dialTalker(t, p, id, target)
	k.start()
	return k
}

// dialTalker connects a client that does not talk before it is started.
func dialTalker(t testing.TB, p *proxy, id int, target string) *talker {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 150*time.Second)
	t.Cleanup(cancel)
	conn, _, err := websocket.Dial(ctx, "ws://"+p.addr+target, nil)
	if err != nil {
		t.Fatalf("client %d: %v", id, err)
	}
	k := &talker{
		id: id, ctx: ctx, conn: conn, quiet: !strings.Contains(target, "echo"), pause: 20 * time.Millisecond,
		quit: make(chan struct{}), sending: make(chan struct{}), over: make(chan struct{}),
	}
	t.Cleanup(func() { _ = k.conn.CloseNow(); <-k.over })
	go k.read()
	return k
}

func (k *talker) start() { go k.send() }

// send owns writing: a message after each pause. It ends with the connection, or by
// quit.
func (k *talker) send() {
	defer close(k.sending)
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-k.quit:
			return
		case <-k.over:
			return
		case <-timer.C:
		}
		if k.conn.Write(k.ctx, websocket.MessageText, []byte(numbered(k.id, int(k.sent.Load())))) != nil {
			return
		}
		k.sent.Add(1)
		timer.Reset(k.pause + rand.N(k.pause*3/2))
	}
}

// read owns reading. It ends with the connection or the test.
func (k *talker) read() {
	defer close(k.over)
	for {
		m, err := readCoder(k.ctx, k.conn)
		if err != nil {
			if !k.closing.Load() {
				k.end = coderEnding(err)
			}
			return
		}
		n := int(k.echoed.Load())
		if m.kind != "text" || string(m.data) != numbered(k.id, n) {
			k.fault = fmt.Sprintf("echo %d: got %s %.40q, want %.40q", n, m.kind, m.data, numbered(k.id, n))
			return
		}
		k.echoed.Add(1)
	}
}

// finishTalkers stops them, waits for all echoes, and closes in good order.
func finishTalkers(t testing.TB, all []*talker) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	var each sync.WaitGroup
	for _, k := range all {
		each.Go(func() {
			if !k.finish(ctx) {
				t.Errorf("client %d: got %d echoes of %d messages", k.id, k.echoed.Load(), k.sent.Load())
			}
		})
	}
	each.Wait()
}

// finish reports whether all echoes have come.
func (k *talker) finish(ctx context.Context) bool {
	close(k.quit)
	<-k.sending
	came := eventually(10*time.Second, func() bool {
		select {
		case <-k.over:
			return true
		default:
			return k.quiet || k.echoed.Load() == k.sent.Load()
		}
	})
	// Once a pong has come, it is read that reads the answer to the close frame.
	if k.conn.Ping(ctx) == nil {
		k.closing.Store(true)
		_ = k.conn.Close(websocket.StatusNormalClosure, "")
	}
	select {
	case <-k.over:
	case <-ctx.Done():
		_ = k.conn.CloseNow()
		<-k.over
	}
	return came && (k.quiet || k.echoed.Load() == k.sent.Load())
}

// wantWhole checks that backends got each message of clients that have finished, once
// and in order, over at most so many connections each.
func wantWhole(t testing.TB, all []*talker, most int, backends ...*backendProcess) {
	t.Helper()
	of := make(map[int][]*backendConn)
	for _, conns := range backendConns(t, backends...) {
		of[senderOf(conns)] = conns
	}
	for _, k := range all {
		del := &delivery{client: k.id, sent: int(k.sent.Load()), ended: k.end, conns: of[k.id]}
		for _, fault := range del.faults(promise{}, 1001) {
			t.Error(fault)
		}
		if k.fault != "" {
			t.Errorf("client %d: %s", k.id, k.fault)
		}
		if len(del.conns) > most {
			t.Errorf("client %d: got %d connections to backends, want at most %d: %v", k.id, len(del.conns), most, del.conns)
		}
	}
}
