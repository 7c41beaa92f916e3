// This file resumes one connection many times.

package e2e

import (
	"fmt"
	"math"
	"net/http"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/gobwas/ws"
)

// A connection that is resumed many times holds no more for it.
func TestManyResumes(t *testing.T) {
	const rounds, warm = 110, 10
	conns := make(chan *rawConn, 1) // of the backend; there is one at a time
	backend := rawBackend(t, func(r *http.Request, c *rawConn) {
		if c.accept(r) != nil {
			return
		}
		conns <- c
		for {
			h, payload, err := c.receive()
			if err != nil {
				return
			}
			reply := ws.NewTextFrame([]byte(payload))
			switch h.OpCode {
			case ws.OpPing:
				reply = ws.NewPongFrame([]byte(payload))
			case ws.OpClose:
				return
			default: // data
			}
			if _, err := c.Write(ws.MustCompileFrame(reply)); err != nil {
				return
			}
		}
	})
	p := startCaddy(t, "", "websocket_proxy "+backend+" {\n resume_interval 1ms 5ms\n resume_limit 0\n}")
	c := rawDial(t, p.addr, "")
	_ = c.SetDeadline(time.Now().Add(3 * time.Minute))
	held := func() (goroutines, heap int) {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return runtime.NumGoroutine(), int(m.HeapAlloc)
	}
	goroutines, heap := math.MaxInt, math.MaxInt
	for n := range rounds {
		b := <-conns
		want := fmt.Sprintf("%d %s", n, strings.Repeat("x", 20_000))
		c.send(t, ws.OpText, want)
		for got := ""; got != want; {
			var err error
			if _, got, err = c.receive(); err != nil {
				t.Fatalf("round %d: %v", n, err)
			}
		}
		if n == warm {
			for range 10 { // what ends is not always gone at once
				g, h := held()
				goroutines, heap = min(goroutines, g), min(heap, h)
				pass(20 * time.Millisecond)
			}
		}
		if n == rounds-1 {
			break
		}
		switch n % 3 {
		case 0:
			_ = b.tcp().SetLinger(0)
			b.Close()
		case 1:
			b.Close()
		case 2:
			b.sendClose(t, 1012, "")
		}
	}
	var list struct {
		Connections []struct{ Resumes int }
	}
	p.call(t, http.MethodGet, "/connections", &list)
	if got := list.Connections[0].Resumes; got != rounds-1 {
		t.Errorf("resumes: got %d, want %d", got, rounds-1)
	}
	goroutinesAfter, heapAfter := math.MaxInt, math.MaxInt
	if !eventually(15*time.Second, func() bool {
		g, h := held()
		goroutinesAfter, heapAfter = min(goroutinesAfter, g), min(heapAfter, h)
		return goroutinesAfter <= goroutines && heapAfter-heap <= 400_000 // a fifth of the messages
	}) {
		t.Errorf("got %d goroutines and %d bytes of heap, before %d more resumes %d and %d", goroutinesAfter, heapAfter, rounds-warm-1, goroutines, heap)
	}
	t.Logf("after %d more resumes: %d goroutines more, %d bytes of heap more", rounds-warm-1, goroutinesAfter-goroutines, heapAfter-heap)
	c.sendClose(t, 1000, "")
	_, _, _, _ = c.receiveClose()
}
