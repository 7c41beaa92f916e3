// This file tests what happens at the limits: of a connection's messages and of
// all memory.

package replay

import (
	"bytes"
	"strings"
	"sync"
	"testing"
)

func TestAtTheLimitTheClientWaits(t *testing.T) {
	c := startWith(t, Unacked, 10, NewBudget(plenty))
	c.unit("<aaaa>", Kept)
	c.unit("<bbbb>", Full)
	c.write(-1)
	c.unit("<bbbb>", Full) // the first may be needed again
	c.unit("<bb>", Kept)
	c.Ack(6, c.mode)
	c.unit("<cccc>", Kept)
	c.limit = 5
	c.unit("<d>", Full)
	c.write(-1)
	c.Ack(c.Mark(), c.mode)
	c.unit("<d>", Kept)
}

func TestMessageLargerThanTheLimitIsStreamed(t *testing.T) {
	for _, test := range []struct {
		mode                     Mode
		partly, whole, afterward Verdict
	}{
		{Unacked, Torn, InDoubt, Resume},
		{Unsent, Torn, Resume, Resume},
		{Strict, Torn, InDoubt, Resume},
		{Off, Resume, Resume, Resume},
	} {
		stream := func(t *testing.T) *client {
			c := startWith(t, test.mode, 10, NewBudget(plenty))
			c.mode = min(c.mode, Strict) // Off streams nothing that was not begun before
			c.unit("<aaaaaa", Kept)
			c.unit("aaaa", Full) // the first part is not written yet
			c.Sent(3)
			c.unit("aaaa", Full)
			c.Sent(4)
			c.down = true
			c.unit("aaaa", Full)
			c.down = false
			c.unit("aaaa", Passed)
			if memory(&c.Queue) != 0 || c.Buffered() != 0 || c.Empty() {
				t.Error("got memory held for a message that is streamed, or nothing begun")
			}
			c.mode = test.mode
			c.write(-1)
			return c
		}
		t.Run(test.mode.String(), func(t *testing.T) {
			c := stream(t)
			c.lost(0, test.partly, 0)
			if test.partly == Resume {
				c.unit("aaaa", Dropped)
				c.unit("aaa>", Dropped)
				c.holds("")
			}
			c = stream(t)
			c.unit("a>", Passed)
			c.Sent(1)
			c.lost(0, test.partly, 0) // its last byte is missing

			c = stream(t)
			c.unit("a>", Passed)
			c.write(-1)
			c.lost(0, test.whole, 0)

			c = stream(t)
			c.unit("a>", Passed)
			c.write(-1)
			c.Ack(c.Mark(), c.mode)
			c.lost(0, test.afterward, 0)
		})
	}
}

func TestUnitLargerThanTheLimitIsStreamed(t *testing.T) {
	for _, test := range []struct {
		name          string
		limit, budget int64
	}{
		{"of the connection", 5, plenty},
		{"of all connections", plenty, 5},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := startWith(t, Unacked, test.limit, NewBudget(test.budget))
			c.down = true
			c.unit("<aaaaaa>", Full)
			c.down = false
			c.unit("<aaaaaa>", Passed)
			c.unit("<bbbbbb>", Full) // the first is not written yet
			if c.Boundary() || c.Outstanding() {
				t.Error("got a boundary, or something outstanding, before what was passed")
			}
			c.write(-1)
			if !c.Boundary() || !c.Outstanding() {
				t.Error("got no boundary, or nothing outstanding, after it")
			}
			c.unit("<bbbbbb>", Passed)
		})
	}
	// What is kept after it waits until it was written.
	c := startWith(t, Unacked, 5, NewBudget(plenty))
	c.unit("<aaaaaa>", Passed)
	c.unit("<b>", Kept)
	c.pending(false, "")
	c.Sent(3)
	c.pending(false, "")
	c.Sent(5)
	c.pending(false, "<b>")
	// Behind a message that may be needed again it has to wait.
	c = startWith(t, Unacked, 5, NewBudget(plenty))
	c.unit("<a>", Kept)
	c.write(-1)
	c.unit("<aaaaaa>", Full)
	c.Ack(3, c.mode)
	c.unit("<aaaaaa>", Passed)
}

// Connections that all hold a part of a message must not wait for each other.
func TestWithoutMemoryTheOpenMessageIsStreamed(t *testing.T) {
	b := NewBudget(1000)
	one, two := startWith(t, Unacked, plenty, b), startWith(t, Unacked, plenty, b)
	one.unit("<"+strings.Repeat("a", 800), Kept)
	two.unit("<"+strings.Repeat("b", 150), Kept)
	one.write(-1)
	two.write(-1)
	two.unit(strings.Repeat("b", 150), Passed)
	one.unit(strings.Repeat("a", 800), Passed)
	if b.Used() != 0 {
		t.Errorf("got %d bytes taken, want 0", b.Used())
	}
}

// Else a message could wait for memory that is there, but never enough of it.
func TestMessageThatFitsIntoAllMemoryOnlyWithoutItsEntryIsStreamed(t *testing.T) {
	c := startWith(t, Unacked, plenty, NewBudget(100))
	c.unit("<"+strings.Repeat("a", 70)+">", Passed)
	c.write(-1)
	c.unit("<"+strings.Repeat("a", 30)+">", Kept)
}

func TestMessagesBehindOthersAreNotStreamed(t *testing.T) {
	c := startWith(t, Unacked, 10, NewBudget(plenty))
	c.unit("<a>", Kept)
	c.unit("<bbbb", Kept)
	c.write(-1)
	c.unit("bbbb", Full)
	c.Ack(3, c.mode)
	c.unit("bbbb", Kept)
}

func TestWithoutMemoryAQueueWithNothingStoredWaits(t *testing.T) {
	b := NewBudget(1000)
	one, two := startWith(t, Unacked, plenty, b), startWith(t, Unacked, plenty, b)
	one.unit("<"+strings.Repeat("a", 800)+">", Kept)
	two.unit("<"+strings.Repeat("b", 800)+">", Full)
	one.write(-1)
	one.Ack(one.Mark(), one.mode)
	two.unit("<"+strings.Repeat("b", 800)+">", Kept)
}

func TestSmallMessagesCountWithTheMemoryThatTheyNeed(t *testing.T) {
	b := NewBudget(10_000)
	c := startWith(t, Unacked, plenty, b)
	n := 0
	for c.Append([]byte("<>"), true, true, true, Unacked, plenty) == Kept {
		if n++; b.Used() > 10_000 {
			t.Fatalf("got %d bytes taken, want 10000 at most", b.Used())
		}
	}
	if n < 200 || n > 1000 {
		t.Errorf("got %d messages in 10000 bytes", n)
	}
}

func TestChunksGrowAndGoAgain(t *testing.T) {
	c := start(t, Unacked)
	var all []byte
	for i := range 3000 {
		m := bytes.Repeat([]byte{byte(i)}, 1+i%700)
		all = append(all, m...)
		if c.Append(m, true, true, true, Unacked, plenty) != Kept {
			t.Fatal("got a message refused")
		}
	}
	if used := c.budget.Used(); used > int64(len(all))+2*maxChunk {
		t.Errorf("got %d bytes taken for %d", used, len(all))
	}
	sizes := []int{}
	for k := c.stored.head; k != nil; k = k.next {
		sizes = append(sizes, cap(k.data))
	}
	if sizes[0] != 512 || sizes[1] != 1024 || sizes[len(sizes)-1] != maxChunk {
		t.Errorf("got chunks of %v, want 512 doubling to %d", sizes, maxChunk)
	}
	for len(all) > 0 {
		p := c.Pending(false)
		if len(p) == 0 || !bytes.HasPrefix(all, p) {
			t.Fatalf("got %d other bytes", len(p))
		}
		all = all[len(p):]
		c.write(len(p))
		c.Ack(c.Mark(), c.mode)
		if used := c.budget.Used(); used > int64(len(all))+3*maxChunk {
			t.Fatalf("got %d bytes taken when %d are left", used, len(all))
		}
	}
}

// A connection whose acknowledgements always come a little late is never empty.
func TestListOfMessagesDoesNotGrowWithTime(t *testing.T) {
	c := start(t, Unacked)
	for range 10_000 {
		c.unit("<a>", Kept)
		c.write(-1)
		if c.ends.len() > 6 {
			c.Ack(c.Mark()-6*3, c.mode)
		}
	}
	if n := cap(c.ends.list); n > 16 {
		t.Errorf("got room for %d messages, want 16 at most for 6", n)
	}
}

func TestBudgetIsNeverExceeded(t *testing.T) {
	b := NewBudget(1000)
	var group sync.WaitGroup
	for range 8 {
		group.Go(func() {
			for range 20_000 {
				if b.reserve(300) {
					if used := b.Used(); used > 1000 {
						t.Errorf("got %d taken of 1000", used)
					}
					b.release(300)
				}
			}
		})
	}
	group.Wait()
	if b.Used() != 0 {
		t.Errorf("got %d taken, want 0", b.Used())
	}
	if !b.reserve(1000) || b.reserve(1) {
		t.Error("got another limit than 1000")
	}
	b.SetLimit(500)
	if b.Used() != 1000 || b.reserve(1) {
		t.Error("got something granted above a lowered limit")
	}
	b.release(600)
	if !b.reserve(100) || b.reserve(1) {
		t.Error("got another limit than 500")
	}
}
