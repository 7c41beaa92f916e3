// This file tests what a Queue takes, hands out and frees, rule by rule.

package replay

import (
	"strings"
	"testing"
)

const plenty = 1 << 30

// client is a Queue with the settings it is used with.
type client struct {
	*testing.T
	Queue
	mode  Mode
	limit int64
	down  bool // no backend
}

func start(t *testing.T, mode Mode) *client {
	return startWith(t, mode, plenty, NewBudget(plenty))
}

func startWith(t *testing.T, mode Mode, limit int64, b *Budget) *client {
	c := &client{T: t, mode: mode, limit: limit}
	c.Init(b)
	t.Cleanup(func() {
		c.Drop()
		if n := memory(&c.Queue); n != 0 {
			t.Errorf("got %d bytes held after Drop, want 0", n)
		}
	})
	return c
}

// unit appends a unit. "<" begins and ">" ends a message.
func (c *client) unit(wire string, want Fate) {
	c.Helper()
	first, last := strings.HasPrefix(wire, "<"), strings.HasSuffix(wire, ">")
	if got := c.Append([]byte(wire), first, last, !c.down, c.mode, c.limit); got != want {
		c.Fatalf("%.20q: got fate %d, want %d", wire, got, want)
	}
}

func (c *client) pending(wholeOnly bool, want string) {
	c.Helper()
	if got := c.Pending(wholeOnly); string(got) != want || want == "" && got != nil {
		c.Fatalf("got %.40q pending, want %.40q", got, want)
	}
}

// write sends n bytes, or all with -1, and the write goes well.
func (c *client) write(n int) {
	c.Helper()
	if n < 0 {
		n = int(c.tail - c.sent)
	}
	c.Sent(n)
	c.Release(c.mode)
}

func (c *client) lost(limit int, want Verdict, replayed int) {
	c.Helper()
	if v, n := c.Lost(c.mode, limit); v != want || n != replayed {
		c.Fatalf("got verdict %d with %d replayed, want %d with %d", v, n, want, replayed)
	}
}

func (c *client) holds(want string) {
	c.Helper()
	if got := c.Buffered(); got != int64(len(want)) {
		c.Fatalf("got %d bytes stored, want %d", got, len(want))
	}
	if got := c.Empty(); got != (want == "") {
		c.Fatalf("got empty %t with %q", got, want)
	}
}

func TestWhatTheNextBackendGets(t *testing.T) {
	for _, test := range []struct {
		name     string
		mode     Mode
		write    int // of "<aaa><bbb><ccc>"
		ack      int // of that
		verdict  Verdict
		next     string
		replayed int
	}{
		{"unacked, nothing written", Unacked, 0, 0, Resume, "<aaa><bbb><ccc>", 0},
		{"unacked, a part written", Unacked, 3, 0, Resume, "<aaa><bbb><ccc>", 0},
		{"unacked, two written", Unacked, 10, 0, Resume, "<aaa><bbb><ccc>", 2},
		{"unacked, all written", Unacked, 15, 0, Resume, "<aaa><bbb><ccc>", 3},
		{"unacked, one read", Unacked, 12, 5, Resume, "<bbb><ccc>", 1},
		{"unacked, a part more read", Unacked, 12, 9, Resume, "<bbb><ccc>", 1},
		{"unacked, all read", Unacked, 15, 15, Resume, "", 0},
		{"unsent, nothing written", Unsent, 0, 0, Resume, "<aaa><bbb><ccc>", 0},
		{"unsent, a part written", Unsent, 4, 0, Resume, "<aaa><bbb><ccc>", 0},
		{"unsent, one and a part written", Unsent, 8, 0, Resume, "<bbb><ccc>", 0},
		{"unsent, one and a part read", Unsent, 8, 8, Resume, "<bbb><ccc>", 0},
		{"unsent, all written", Unsent, 15, 0, Resume, "", 0},
		{"strict, a part written", Strict, 4, 0, Resume, "<aaa><bbb><ccc>", 0},
		{"strict, one written", Strict, 5, 0, InDoubt, "", 0},
		{"strict, one written and read", Strict, 5, 5, Resume, "<bbb><ccc>", 0},
		{"strict, a part more read", Strict, 8, 8, Resume, "<bbb><ccc>", 0},
		{"strict, one more written than read", Strict, 10, 9, InDoubt, "", 0},
	} {
		for _, split := range []bool{false, true} {
			t.Run(test.name, func(t *testing.T) {
				c := start(t, test.mode)
				for _, m := range []string{"<aaa>", "<bbb>", "<ccc>"} {
					if split {
						c.unit(m[:2], Kept)
						m = m[2:]
					}
					c.unit(m, Kept)
				}
				c.write(test.write)
				c.Ack(uint64(test.ack), test.mode)
				c.lost(0, test.verdict, test.replayed)
				if test.verdict != Resume {
					return
				}
				if !c.Boundary() || c.Outstanding() || c.Backlog() != (test.next != "") {
					t.Error("got something begun on a backend that is not there")
				}
				c.holds(test.next)
				c.pending(false, test.next)
			})
		}
	}
}

func TestMessageOfTheLostBackendGoesOnAtTheNext(t *testing.T) {
	for _, mode := range []Mode{Unacked, Unsent, Strict} {
		c := start(t, mode)
		c.unit("<aa", Kept)
		c.write(-1)
		c.lost(0, Resume, 0)
		c.unit("bb>", Kept)
		c.pending(false, "<aabb>")
	}
}

func TestReplayedCountsWhatAnyBackendGot(t *testing.T) {
	c := start(t, Unacked)
	c.unit("<a>", Kept)
	c.unit("<b>", Kept)
	c.unit("<c>", Kept)
	c.write(6)
	c.lost(0, Resume, 2)
	c.lost(0, Resume, 2) // this one died before it got anything
	c.write(3)
	c.lost(0, Resume, 2)
	c.write(3)
	c.Ack(c.Mark(), c.mode)
	c.lost(0, Resume, 1)
	c.write(4)
	c.lost(0, Resume, 1) // a part of <c> is no repeat
}

func TestFailedWriteIsNotTakenForWritten(t *testing.T) {
	for _, test := range []struct {
		name     string
		mode     Mode
		unsent   int
		next     string
		replayed int
	}{
		{"unacked, a byte short", Unacked, 1, "<aaa><bbb>", 1},
		{"unacked, at a boundary", Unacked, 5, "<aaa><bbb>", 1},
		{"unacked, nothing was", Unacked, 10, "<aaa><bbb>", 0},
		{"unsent, a byte short", Unsent, 1, "<bbb>", 0},
		{"unsent, in the first", Unsent, 6, "<aaa><bbb>", 0},
		{"strict, nothing was", Strict, 10, "<aaa><bbb>", 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := start(t, test.mode)
			c.unit("<aaa>", Kept)
			c.unit("<bbb>", Kept)
			c.Sent(10)
			c.Unsent(test.unsent)
			c.lost(0, Resume, test.replayed)
			c.pending(false, test.next)
		})
	}
}

func TestWhatIsFreedWhen(t *testing.T) {
	for _, test := range []struct {
		mode           Mode
		written, acked string
	}{
		{Unacked, "<aa><bb>", "<bb>"},
		{Unsent, "<bb>", "<bb>"},
		{Strict, "<bb>", "<bb>"},
	} {
		t.Run(test.mode.String(), func(t *testing.T) {
			c := start(t, test.mode)
			c.unit("<aa>", Kept)
			c.unit("<bb>", Kept)
			c.Sent(6)
			c.holds("<aa><bb>")
			if !c.Outstanding() || c.Boundary() {
				t.Errorf("got outstanding %t, boundary %t, want true, false", c.Outstanding(), c.Boundary())
			}
			c.Release(test.mode)
			c.holds(test.written)
			c.Ack(3, test.mode)
			c.holds(test.written)
			c.Ack(4, test.mode)
			c.holds(test.acked)
			c.Ack(2, test.mode) // comes late
			if c.Outstanding() {
				t.Error("got outstanding, want no: only a part of the second was sent")
			}
			c.write(-1)
			c.Ack(8, test.mode)
			c.holds("")
			if n := memory(&c.Queue); n != 0 || c.budget.Used() != 0 {
				t.Errorf("got %d bytes held, %d taken while empty, want 0", n, c.budget.Used())
			}
		})
	}
}

func TestLeavingBackendGetsOnlyTheMessageThatItHasBegun(t *testing.T) {
	c := start(t, Unacked)
	c.unit("<aaa>", Kept)
	c.unit("<bb", Kept)
	c.pending(true, "")
	c.Sent(2)
	c.pending(true, "aa>")
	c.Sent(3)
	c.pending(true, "")
	c.pending(false, "<bb")
	c.Sent(1)
	c.pending(true, "bb")
	c.Sent(2)
	c.pending(true, "")
	if c.Boundary() {
		t.Error("got a boundary inside a message")
	}
	c.unit("b>", Kept)
	c.pending(true, "b>")
	c.Sent(2)
	if !c.Boundary() {
		t.Error("got no boundary after a message")
	}
}

func TestWritersKeepWhatTheyWrite(t *testing.T) {
	c := start(t, Unsent)
	first := "<" + strings.Repeat("a", 100) + ">"
	c.unit(first, Kept)
	p := c.Pending(false)
	c.Sent(len(p))
	c.Ack(c.Mark(), c.mode) // all is freed before the write has returned
	c.unit("<"+strings.Repeat("b", 100)+">", Kept)
	if string(p) != first {
		t.Errorf("got %q after it was freed, want it unchanged", p)
	}
	if cap(p) != len(p) {
		t.Error("got room behind what is pending, want none")
	}
}

func TestAfterDropNothingIsTaken(t *testing.T) {
	c := start(t, Unacked)
	c.unit("<a>", Kept)
	c.unit("<bb", Kept)
	c.Sent(6)
	c.Drop()
	c.unit("b", Dropped)
	c.unit("<c>", Dropped)
	c.pending(false, "")
	c.Unsent(2) // the write that was under way has failed
	c.Ack(3, c.mode)
	c.Drop()
	if c.budget.Used() != 0 || c.Buffered() != 0 {
		t.Errorf("got %d bytes taken, want 0", c.budget.Used())
	}
}

func TestImpossibleCallsPanic(t *testing.T) {
	for name, call := range map[string]func(c *client){
		"sent beyond the end": func(c *client) { c.Sent(4) },
		"sent less than none": func(c *client) { c.Sent(-1) },
		"ack beyond sent":     func(c *client) { c.Ack(2, c.mode) },
		"taken back too much": func(c *client) { c.Unsent(2) },
		"begins twice":        func(c *client) { c.unit("<b", Kept); c.unit("<c>", Kept) },
		"goes on from none":   func(c *client) { c.unit("b>", Kept) },
		"ack of the lost one": func(c *client) { c.write(2); m := c.Mark(); c.lost(0, Resume, 1); c.Ack(m, c.mode) },
	} {
		t.Run(name, func(t *testing.T) {
			c := start(t, Unacked)
			c.unit("<a>", Kept)
			c.Sent(1)
			defer func() {
				if s, ok := recover().(string); !ok || !strings.HasPrefix(s, "replay: ") {
					t.Errorf("got %v, want a panic that says what is wrong", s)
				}
			}()
			call(c)
		})
	}
}

// A ping may be marked and then not written. A pong that looks like its answer
// is a peer's doing and must not end the process.
func TestAckOfWhatWasTakenBackIsNoPanic(t *testing.T) {
	c := start(t, Unacked)
	c.unit("<aa>", Kept)
	c.Sent(4)
	m := c.Mark()
	c.Unsent(2)
	c.Ack(m, c.mode)
	c.lost(0, Resume, 0)
	c.pending(false, "<aa>")
}

// The acknowledgements of 64 messages come with one pong.
func BenchmarkSmallMessages(b *testing.B) {
	for _, batch := range []int{1, 64, 1024} {
		b.Run(map[int]string{1: "each", 64: "by 64", 1024: "by 1024"}[batch], func(b *testing.B) {
			var q Queue
			q.Init(NewBudget(plenty))
			unit := make([]byte, 64)
			b.SetBytes(64)
			b.ReportAllocs()
			n := 0
			for b.Loop() {
				q.Append(unit, true, true, true, Unacked, plenty)
				q.Sent(len(unit))
				q.Release(Unacked)
				if n++; n%batch == 0 {
					q.Ack(q.Mark(), Unacked)
				}
			}
		})
	}
}

// The owner writes a ping or a close frame between two runs.
func TestRunsEndWithAFrame(t *testing.T) {
	q := new(Queue)
	q.Init(NewBudget(1 << 20))
	boundary := map[uint64]bool{0: true}
	var at uint64
	for i := range 2000 {
		wire := make([]byte, 1+i*37%900)
		if got := q.Append(wire, true, true, false, Unacked, 1<<20); got != Kept {
			t.Fatalf("got %v for message %d, want it kept", got, i)
		}
		at += uint64(len(wire))
		boundary[at] = true
	}
	runs := 0
	for run := q.Pending(false); run != nil; run = q.Pending(false) {
		q.Sent(len(run))
		runs++
		if !boundary[q.Mark()] {
			t.Fatalf("got a run that ends at %d, inside a frame", q.Mark())
		}
	}
	if q.Mark() != at || runs < 2 {
		t.Errorf("got %d bytes in %d runs, want %d in several", q.Mark(), runs, at)
	}
}
