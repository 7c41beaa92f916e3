// This file has backends die at every byte of what they write, and looks for messages
// that are torn, merged, split or missing at the client.

package e2e

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gobwas/ws"

	"github.com/holdfast-proxy/caddy-holdfast/internal/frame"
)

// downPlay is a client to which a backend says something, and dies after a number of
// bytes. The next one greets, and closes when it is thanked.
type downPlay struct {
	*lines
	n     int
	death string
	early bool // the bytes come together with the handshake

	thanked chan *hearing
}

func (p *downPlay) String() string {
	return fmt.Sprintf("%s, %s at %d of %d, early %v", p.name, p.death, p.n, len(p.wire), p.early)
}

func (p *downPlay) first(c *rawConn) {
	_, _ = c.Write(p.wire[:p.n])
	c.die(p.death)
}

func (p *downPlay) second(c *rawConn, _ string) {
	h := new(hearing)
	_, _ = c.Write(frame.Append(nil, ws.OpText, []byte("greetings"), false))
	for {
		head, payload, err := c.receive()
		if err != nil || head.OpCode == ws.OpClose {
			break
		}
		h.hear(head, payload)
		if payload == "thanks" {
			_, _ = c.Write(frame.AppendClose(nil, 1000, "done", false))
		}
	}
	select {
	case p.thanked <- h:
	default: // a third one: the client tells
	}
}

func (p *downPlay) run(t testing.TB, s *stage) {
	p.thanked = make(chan *hearing, 1)
	c := s.enter(t, "unacked", p)
	defer c.Close()
	h := new(hearing)
	var closed says
	for closed.code == 0 {
		head, payload, err := c.receive()
		if err != nil {
			t.Errorf("%v: the client is cut off after %v: %v", p, h.messages, err)
			return
		}
		h.hear(head, payload)
		switch {
		case head.OpCode == ws.OpPing:
			c.send(t, ws.OpPong, payload)
		case head.OpCode == ws.OpText && payload == "greetings":
			c.send(t, ws.OpText, "thanks")
		case head.OpCode == ws.OpClose:
			closed = says{uint16(payload[0])<<8 | uint16(payload[1]), payload[2:]}
			c.sendClose(t, closed.code, "")
		}
	}
	want := p.before(p.n)
	torn := p.torn(p.n)
	wantClose := says{1000, "done"}
	if torn {
		wantClose = says{1012, "a message was cut off"}
	} else {
		want.messages = append(want.messages, said{ws.OpText, "greetings"})
	}
	if h.fault != nil || closed != wantClose || !slices.Equal(h.messages, want.messages) || !slices.Equal(h.pings, want.pings) || (h.part != nil) != torn {
		t.Errorf("%v: the client got %v, pings %q, part %v, %v, and %+v; want %v, pings %q, torn %v and %+v", p,
			h.messages, h.pings, h.part, h.fault, closed, want.messages, want.pings, torn, wantClose)
	}
	if h.part != nil {
		whole := p.messages[len(h.messages)]
		if h.part.op != whole.op || !strings.HasPrefix(whole.payload, h.part.payload) {
			t.Errorf("%v: the client got %v as the beginning of %v", p, h.part, whole)
		}
		return
	}
	select {
	case got := <-p.thanked:
		if got.fault != nil || !slices.Equal(got.messages, []said{{ws.OpText, "thanks"}}) {
			t.Errorf("%v: the second backend got %v, %v; want thanks", p, got.messages, got.fault)
		}
	case <-time.After(10 * time.Second):
		t.Errorf("%v: the second backend is not told the end", p)
	}
}

// A backend dies at any byte of what it says: the client gets whole messages and goes
// on, or is told with 1012 that one was cut off.
func TestBackendDiesWriting(t *testing.T) {
	s := startStage(t, map[string]string{"unacked": ""})
	var plays []*downPlay
	small := smallLines(false)
	for n := range len(small.wire) + 1 {
		plays = append(plays, &downPlay{lines: small, n: n, death: byFin}, &downPlay{lines: small, n: n, death: byReset})
		if n == 0 || slices.Contains(small.frames, n) {
			plays = append(plays, &downPlay{lines: small, n: n, death: byGoodbye})
		}
	}
	for _, big := range bigLines(false) {
		for i, n := range big.edges() {
			plays = append(plays, &downPlay{lines: big, n: n, death: byFin})
			if full || i%3 == 0 {
				plays = append(plays, &downPlay{lines: big, n: n, death: byReset})
			}
			if slices.Contains(big.frames, n) {
				plays = append(plays, &downPlay{lines: big, n: n, death: byGoodbye})
			}
		}
	}
	together(plays, func(p *downPlay) { p.run(t, s) })
	t.Logf("%d connections", len(plays))
}
