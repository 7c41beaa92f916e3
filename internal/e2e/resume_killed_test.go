// This file kills backends that are real processes in the middle of a flood, both ways.

package e2e

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gobwas/ws"

	"github.com/holdfast-proxy/caddy-holdfast/internal/frame"
)

// Backends that are real processes are killed while they send a lot, in messages that
// take the proxy several reads, and while they are sent a lot. Three backends may die
// before what they send lets an acknowledgement through: resume_limit would see poison.
func TestBackendKilledInTheMiddle(t *testing.T) {
	a, b := startBackend(t, "gorilla", "a"), startBackend(t, "coder", "b")
	p := startCaddy(t, "", fmt.Sprintf("websocket_proxy %s %s {\n resume_interval 1ms 50ms\n resume_limit 0\n}", a.addr, b.addr))
	const clients, lazy = 10, 2
	const rate = 20_000_000 // bytes per second to each client, in 50 messages
	var all []*flooded
	for i := range clients {
		_, c := rawRequest(t, p.addr, strings.Replace(rawUpgrade(p.addr, ""), "x=1", "stream="+strconv.Itoa(rate), 1))
		_ = c.SetDeadline(time.Now().Add(2 * time.Minute))
		f := &flooded{id: i, conn: c, quit: make(chan struct{}), sent: make(chan struct{}), over: make(chan struct{})}
		all = append(all, f)
		t.Cleanup(func() { c.Close(); <-f.over; <-f.sent })
		go f.send()
		if i < lazy {
			_ = c.tcp().SetReadBuffer(64 << 10)
		} else {
			go f.read()
		}
	}
	// Those that do not read yet get messages with which their backends are stuck.
	pass(1500 * time.Millisecond)
	kill(t, a, b)
	for _, f := range all[:lazy] {
		go f.read()
	}
	a.restart(t)
	b.restart(t)
	for range long(2, 10) {
		for i, lost := range []*backendProcess{a, b} {
			pass(300 * time.Millisecond)
			[]func(testing.TB, ...*backendProcess){kill, killBusy}[i](t, lost)
			pass(200 * time.Millisecond)
			lost.restart(t)
		}
	}
	pass(300 * time.Millisecond)
	for _, f := range all {
		close(f.quit)
	}
	torn := 0
	for _, f := range all {
		<-f.sent
		select {
		case <-f.over:
		case <-time.After(20 * time.Second):
			t.Errorf("client %d: nobody answers its close frame", f.id)
			f.conn.Close()
			<-f.over
		}
	}
	for _, f := range all {
		switch {
		case f.fault != nil:
			t.Errorf("client %d: %v", f.id, f.fault)
		case f.closed == says{1012, "a message was cut off"}:
			torn++
			if f.heard.part == nil {
				t.Errorf("client %d: it was closed for a message that was cut off, but there is none", f.id)
			}
		case f.closed != says{1000, ""}:
			t.Errorf("client %d: closed with %+v", f.id, f.closed)
		}
	}
	for _, c := range backendConns(t, a, b) {
		id := senderOf(c)
		if id < 0 {
			continue
		}
		f := all[id]
		d := delivery{client: id, sent: f.count, conns: c}
		if f.closed.code == 1012 {
			d.ended = ending{Code: 1012, Clean: true}
		}
		for _, fault := range d.faults(promise{repeats: true, doubt: true}, 1006) {
			t.Error(fault)
		}
	}
	t.Logf("%d of %d clients were in the middle of a message", torn, clients)
	if torn < lazy {
		t.Errorf("clients in the middle of a message: got %d, want at least %d", torn, lazy)
	}
}

// flooded is a client to which backends send a lot and which sends a lot.
type flooded struct {
	id   int
	conn *rawConn
	mu   sync.Mutex // one writer at a time
	quit chan struct{}
	sent chan struct{} // closed by send
	over chan struct{} // closed by read

	count  int // messages sent, valid after sent
	heard  hearing
	closed says
	fault  error // these three are valid after over
}

// send sends numbered messages in fragments until quit, and then closes. It ends when
// the connection does.
func (f *flooded) send() {
	defer close(f.sent)
	for ; ; f.count++ {
		select {
		case <-f.quit:
			f.write(frame.AppendClose(nil, 1000, "", true))
			return
		case <-f.over:
			return
		case <-time.After(2 * time.Millisecond):
		}
		m := numbered(f.id, f.count)
		wire := wireFrame(text, m[:5], true, 0)
		wire = append(wire, wireFrame(fin|pingOp, "flood", true, 0)...)
		wire = append(wire, wireFrame(fin|more, m[5:], true, 0)...)
		if f.write(wire) != nil {
			return
		}
	}
}

func (f *flooded) write(wire []byte) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	_, err := f.conn.Write(wire)
	return err
}

// read reads until a close frame, which it answers if it is not the answer, or the end.
func (f *flooded) read() {
	defer close(f.over)
	next := make(map[string]int) // number of the next message of each of the backends' connections
	for {
		head, payload, err := f.conn.receive()
		if err != nil {
			f.fault = errors.Join(f.fault, fmt.Errorf("cut off: %w", err))
			return
		}
		f.heard.hear(head, payload)
		if f.heard.fault != nil {
			f.fault = f.heard.fault
			return
		}
		switch head.OpCode {
		case ws.OpPing:
			_ = f.write(frame.Append(nil, ws.OpPong, []byte(payload), true))
		case ws.OpClose:
			f.closed = says{uint16(payload[0])<<8 | uint16(payload[1]), payload[2:]}
			if f.closed.code != 1000 {
				_ = f.write(frame.AppendClose(nil, f.closed.code, "", true))
			}
			return
		default:
		}
		for _, m := range f.heard.messages {
			at := strings.LastIndexByte(strings.TrimRight(m.payload, "."), ' ')
			n, err := strconv.Atoi(strings.TrimRight(m.payload, ".")[at+1:])
			who := m.payload[:at+1] // the same again with each process
			if err != nil || n != next[who] && n != 0 || !strings.HasSuffix(m.payload, ".") {
				f.fault = errors.Join(f.fault, fmt.Errorf("got %v, want message %d", m, next[who]))
				return
			}
			next[who] = n + 1
		}
		f.heard.messages = nil
	}
}
