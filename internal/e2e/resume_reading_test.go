// This file has backends die at every byte of what they read, and looks for messages
// that are torn, merged, split, missing or out of order at the next one, and for pongs
// that are out of order at the client.

package e2e

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"slices"
	"testing"

	"github.com/gobwas/ws"

	"github.com/holdfast-proxy/caddy-holdfast/internal/frame"
)

// upPlay is a client that says something to a backend which dies when it has read a
// number of bytes. The next one greets, and listens.
type upPlay struct {
	*lines
	mode  string
	n     int
	death string
	// late: n is how many bytes the client has sent, of which the first backend has
	// read all frames that are whole.
	late  bool
	pongs bool // the first backend answers the proxy's pings

	got    chan []byte // what the first backend has read
	again  chan *hearing
	resume string // valid after again

	pongsOf []string // what the client got; valid after run
	ended   bool     // … which is that it was closed with 1012
}

func (p *upPlay) String() string {
	return fmt.Sprintf("%s, replay %s, %s at %d of %d, late %v, pongs %v", p.name, p.mode, p.death, p.n, len(p.wire), p.late, p.pongs)
}

func (p *upPlay) first(c *rawConn) {
	goodbye := func() { _, _ = c.Write(frame.AppendClose(nil, 1012, "", false)) }
	var wire bytes.Buffer
	source := io.Reader(c.Conn) // nothing is buffered above it: nothing has come before the 101
	switch {
	case p.late:
	case p.death == byFarewell:
		source = io.MultiReader(io.LimitReader(c.Conn, int64(p.n)), &then{Reader: c.Conn, do: goodbye})
	default:
		source = io.LimitReader(c.Conn, int64(p.n))
	}
	c.br = bufio.NewReader(io.TeeReader(source, &wire))
	want, h := p.before(p.n), new(hearing)
	// Frames may come in smaller pieces than they were sent.
	for !p.late || len(h.messages) < len(want.messages) || len(h.pings) < len(want.pings) {
		head, payload, err := c.receive()
		if err != nil || head.OpCode == ws.OpClose {
			break
		}
		if head.OpCode != ws.OpPing || len(payload) != 16 {
			h.hear(head, payload)
		} else if p.pongs {
			_, _ = c.Write(frame.Append(nil, ws.OpPong, []byte(payload), false))
		}
	}
	if p.late && p.death == byFarewell {
		goodbye()
		for head := (ws.Header{}); head.OpCode != ws.OpClose; {
			var err error
			if head, _, err = c.receive(); err != nil {
				break
			}
		}
	}
	p.got <- wire.Bytes()
	c.die(p.death)
}

// then is a Reader that does something before it is first read.
type then struct {
	io.Reader
	do func()
}

func (r *then) Read(p []byte) (int, error) {
	if r.do != nil {
		r.do()
		r.do = nil
	}
	return r.Reader.Read(p)
}

// theEnd is what the client says when it knows that there is another backend.
var theEnd = said{ws.OpText, "the end"}

func (p *upPlay) second(c *rawConn, resume string) {
	h := new(hearing)
	_, _ = c.Write(frame.Append(nil, ws.OpText, []byte("greetings"), false))
	for {
		head, payload, err := c.receive()
		if err != nil {
			break
		}
		h.hear(head, payload)
		if head.OpCode == ws.OpPing {
			_, _ = c.Write(frame.Append(nil, ws.OpPong, []byte(payload), false))
		}
		if head.OpCode == ws.OpClose {
			_, _ = c.Write(frame.Append(nil, ws.OpClose, []byte(payload), false))
			break
		}
	}
	p.resume = resume
	select {
	case p.again <- h:
	default: // a third one: the client tells
	}
}

func (p *upPlay) run(t testing.TB, s *stage) {
	p.got, p.again = make(chan []byte, 1), make(chan *hearing, 1)
	c := s.enter(t, p.mode, p)
	defer c.Close()
	var got []byte
	if p.late {
		_, _ = c.Write(p.wire[:p.n])
		got = <-p.got
		_, _ = c.Write(p.wire[p.n:])
	} else {
		// The client may be ended while it writes.
		if _, err := c.Write(p.wire); err != nil && p.mode == "unacked" {
			t.Errorf("%v: client's write: %v", p, err)
		}
	}

	h := new(hearing)
	var closed says
	for {
		head, payload, err := c.receive()
		if err != nil {
			t.Errorf("%v: the client is cut off after %v: %v", p, h.messages, err)
			return
		}
		h.hear(head, payload)
		if head.OpCode == ws.OpText && payload == "greetings" {
			c.send(t, theEnd.op, theEnd.payload)
			c.sendClose(t, 1000, "")
		}
		if head.OpCode == ws.OpClose {
			closed = says{uint16(payload[0])<<8 | uint16(payload[1]), payload[2:]}
			break
		}
	}
	if !p.late {
		got = <-p.got
	}
	before := heard(got)
	if k := len(before.messages); before.fault != nil || k > len(p.messages) || !slices.Equal(before.messages, p.messages[:k]) {
		t.Errorf("%v: the first backend got %v, %v; want the first of %v", p, before.messages, before.fault, p.messages)
		return
	}
	if closed.code == 1012 {
		c.sendClose(t, 1012, "")
		p.ended = true
		if p.mode != "strict" && p.mode != "streamed" || p.death == byFarewell && !p.streams() {
			t.Errorf("%v: the client was ended: %+v", p, closed)
		}
		return
	}
	if closed != (says{1000, ""}) {
		t.Errorf("%v: the client was ended: %+v", p, closed)
		return
	}
	p.pongsOf = h.pongs
	// In which order is TestPongsInOrder's.
	if !slices.Equal(slices.Sorted(slices.Values(h.pongs)), slices.Sorted(slices.Values(p.pings))) {
		t.Errorf("%v: pongs that the client got: %q, want %q", p, h.pongs, p.pings)
	}
	p.check(t, len(before.messages), <-p.again)
}

// streams reports whether there is a message that the proxy cannot keep.
func (p *upPlay) streams() bool {
	return p.mode == "streamed" && slices.ContainsFunc(p.messages, func(m said) bool { return len(m.payload) > 30<<10 })
}

// check compares what both backends got, of which the first one has read whole messages
// completely.
func (p *upPlay) check(t testing.TB, whole int, after *hearing) {
	if after.fault != nil || after.part != nil {
		t.Errorf("%v: what the second backend got: %v, part %v", p, after.fault, after.part)
	}
	all := append(slices.Clone(p.messages), theEnd)
	begin := len(all) - len(after.messages)
	if begin < 0 || !slices.Equal(after.messages, all[begin:]) {
		t.Errorf("%v: the second backend got %v, want the last of %v", p, after.messages, all)
		return
	}
	var attempt, replayed, cause int
	if _, err := fmt.Sscanf(p.resume, "attempt=%d, replayed=%d, cause=%d", &attempt, &replayed, &cause); err != nil {
		t.Errorf("%v: Holdfast-Resume: got %q", p, p.resume)
	}
	want := 1006
	if p.death == byGoodbye || p.death == byFarewell {
		want = 1012
	}
	if cause != want || attempt != 1 {
		t.Errorf("%v: Holdfast-Resume: got %q, want attempt 1 and cause %d", p, p.resume, want)
	}
	repeats, missing := whole-begin, begin-whole
	if p.death == byFarewell && (repeats > 0 || replayed > 0 || missing > 0 && p.mode != "off") {
		t.Errorf("%v: the first backend read %d messages and was answered, the second one got the last %d of %d, and %q",
			p, whole, len(after.messages), len(all), p.resume)
	}
	switch p.mode {
	case "unacked", "streamed":
		if missing > 0 {
			t.Errorf("%v: %d messages are lost: the first backend read %d, the second one got the last %d of %d", p, missing, whole, len(after.messages), len(all))
		}
	case "unsent":
		if repeats > 0 {
			t.Errorf("%v: %d messages came twice", p, repeats)
		}
	case "strict":
		if repeats != 0 {
			t.Errorf("%v: %d messages came twice, or were lost if that is negative", p, repeats)
		}
	case "off":
		if repeats > 0 {
			t.Errorf("%v: %d messages came twice", p, repeats)
		}
	}
	if repeats > replayed {
		t.Errorf("%v: %d messages came twice, %q allows less", p, repeats, p.resume)
	}
}

// replays are the sites of the tests of what clients say.
var replays = map[string]string{
	"unacked":  "",
	"unsent":   "replay unsent",
	"strict":   "replay strict",
	"off":      "replay off",
	"streamed": "replay_buffer 30KiB",
}

// What a client says while its backend dies at any byte arrives, as whole messages and
// in order.
func TestBackendDiesReading(t *testing.T) {
	s := startStage(t, replays)
	var plays []*upPlay
	small := smallLines(true)
	for mode := range replays {
		step := 7
		if mode == "unacked" {
			step = 1
		}
		// The first backend reads the proxy's pings as well: there is more to read.
		for _, n := range small.every(step) {
			for _, death := range []string{byReset, byFin, byGoodbye, byFarewell} {
				plays = append(plays,
					&upPlay{lines: small, mode: mode, n: n, death: death, pongs: n%2 == 1},
					&upPlay{lines: small, mode: mode, n: n, death: death, late: true, pongs: n%2 == 0})
				if full {
					plays = append(plays,
						&upPlay{lines: small, mode: mode, n: n, death: death, pongs: n%2 == 0},
						&upPlay{lines: small, mode: mode, n: n, death: death, late: true, pongs: n%2 == 1})
				}
			}
		}
	}
	together(plays, func(p *upPlay) { p.run(t, s) })
	checkEnded(t, plays)
}

// The same with messages for which the proxy's buffers are too small.
func TestBackendDiesReadingBig(t *testing.T) {
	s := startStage(t, replays)
	var plays []*upPlay
	for _, big := range bigLines(true) {
		for i, n := range big.edges() {
			for j, death := range []string{byReset, byFin, byGoodbye, byFarewell} {
				if !full && (i+j)%4 != 0 {
					continue
				}
				for mode := range replays {
					if !full && mode != "unacked" && (i/4+len(mode))%5 != 0 {
						continue
					}
					plays = append(plays,
						// What is larger than the buffer waits until all before it is acknowledged.
						&upPlay{lines: big, mode: mode, n: n, death: death, pongs: mode == "streamed" || i%2 == 0},
						&upPlay{lines: big, mode: mode, n: n, death: death, late: true, pongs: true})
				}
			}
		}
	}
	together(plays, func(p *upPlay) { p.run(t, s) })
	checkEnded(t, plays)
}

// checkEnded checks that where clients may be closed some were, and others were not.
func checkEnded(t testing.TB, plays []*upPlay) {
	t.Helper()
	all, ended := make(map[string]int), make(map[string]int)
	for _, p := range plays {
		all[p.mode]++
		if p.ended {
			ended[p.mode]++
		}
	}
	t.Logf("connections: %v, of which were closed: %v", all, ended)
	if n := ended["strict"]; n == 0 || n == all["strict"] {
		t.Errorf("strict: %d of %d clients were closed, want some", n, all["strict"])
	}
}

// Pongs come in the order of the client's pings, also of those that the lost backend has
// not answered and of those that it never got.
func TestPongsInOrder(t *testing.T) {
	s := startStage(t, replays)
	var plays []*upPlay
	small := smallLines(true)
	for n := range len(small.wire) {
		plays = append(plays, &upPlay{lines: small, mode: "unacked", n: n, death: []string{byReset, byFin, byGoodbye}[n%3], late: true})
	}
	together(plays, func(p *upPlay) { p.run(t, s) })
	var wrong []string
	for _, p := range plays {
		if !slices.Equal(p.pongsOf, p.pings) {
			wrong = append(wrong, fmt.Sprintf("%v: got %q", p, p.pongsOf))
		}
	}
	if len(wrong) > 0 {
		t.Errorf("pongs in another order than the pings %q: %d times, the first: %s", small.pings, len(wrong), wrong[0])
	}
}
