// This file tests how backends are counted that break with the same message.

package replay

import (
	"math/rand/v2"
	"testing"
)

func TestPoison(t *testing.T) {
	// What happens with one backend: so many bytes of "<a><b><c>" are written
	// from the first unacknowledged on, so many are acknowledged.
	type backend struct {
		write, ack int
		want       Verdict
	}
	for _, test := range []struct {
		name     string
		limit    int
		backends []backend
	}{
		{"three in a row", 3, []backend{{9, 0, Resume}, {9, 0, Resume}, {9, 0, Poison}}},
		{"no guard", 0, []backend{{9, 0, Resume}, {9, 0, Resume}, {9, 0, Resume}, {9, 0, Resume}}},
		{"the first one", 1, []backend{{3, 0, Poison}}},
		{"a part does not count", 1, []backend{{2, 0, Resume}, {2, 0, Resume}}},
		{"one that got nothing is between", 2, []backend{{3, 0, Resume}, {0, 0, Resume}, {3, 0, Resume}, {3, 0, Poison}}},
		{"acknowledged between", 2, []backend{{3, 0, Resume}, {6, 3, Resume}, {3, 0, Poison}}},
		{"a longer one after a shorter one", 3, []backend{{3, 0, Resume}, {6, 0, Resume}, {9, 0, Poison}}},
		{"the second counts since it was written", 3, []backend{{3, 0, Resume}, {6, 0, Resume}, {6, 3, Resume}, {3, 0, Poison}}},
		{"the second was not written between", 3, []backend{{6, 0, Resume}, {3, 0, Resume}, {6, 3, Resume}, {6, 0, Resume}, {3, 0, Poison}}},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := start(t, Unacked)
			c.unit("<a>", Kept)
			c.unit("<b>", Kept)
			c.unit("<c>", Kept)
			for i, b := range test.backends {
				from := c.Mark()
				c.write(b.write)
				c.Ack(from+uint64(b.ack), c.mode)
				if v, _ := c.Lost(Unacked, test.limit); v != b.want {
					t.Fatalf("backend %d: got verdict %d, want %d", i, v, b.want)
				}
			}
		})
	}
}

func TestPoisonIsOfUnackedOnly(t *testing.T) {
	c := start(t, Unacked)
	c.unit("<a>", Kept)
	c.write(-1)
	c.lost(2, Resume, 1)
	c.mode = Off // nothing is sent again: the count starts anew
	c.lost(2, Resume, 0)
	c.mode = Unacked
	c.unit("<b>", Kept)
	c.write(-1)
	c.lost(2, Resume, 1)
	c.write(-1)
	c.lost(2, Poison, 0)
}

func TestWithoutAGuardNothingIsCounted(t *testing.T) {
	c := start(t, Unacked)
	c.unit("<a>", Kept)
	for _, limit := range []int{2, 0, 2} {
		c.write(-1)
		c.lost(limit, Resume, 1)
	}
	c.write(-1)
	c.lost(2, Poison, 0)
}

// Many messages, backends that get and read any number of them, and a count for
// each message.
func TestPoisonIsCountedForEachMessage(t *testing.T) {
	first, n := seeds(t, 3000)
	poisoned := 0
	for seed := first; seed < first+n; seed++ {
		rng := rand.New(rand.NewPCG(seed, 6))
		c := start(t, Unacked)
		limit := 1 + rng.IntN(6)
		var counts []int // of the messages that are stored
		for {
			for range rng.IntN(4) {
				c.unit("<a>", Kept)
				counts = append(counts, 0)
			}
			from, written := c.Mark(), rng.IntN(len(counts)+1)
			c.write(3 * written)
			acked := 0
			if rng.IntN(2) == 0 {
				acked = rng.IntN(written + 1)
			}
			c.Ack(from+uint64(3*acked), c.mode)
			counts, written = counts[acked:], written-acked
			worst := 0
			for i := range counts {
				if counts[i]++; i >= written {
					counts[i] = 0
				}
				worst = max(worst, counts[i])
			}
			want := Resume
			if worst >= limit {
				want = Poison
			}
			if v, _ := c.Lost(c.mode, limit); v != want {
				t.Fatalf("HOLDFAST_SEED=%d: got verdict %d with limit %d and counts %v, want %d", seed, v, limit, counts, want)
			}
			if want == Poison {
				poisoned++
				break
			}
			if rng.IntN(20) == 0 {
				break
			}
		}
		c.Drop()
	}
	if n > 1 && poisoned < 100 {
		t.Errorf("got %d poisoned, want more: the test is void", poisoned)
	}
}

func TestStrikesAreForgottenWithTheirMessages(t *testing.T) {
	c := start(t, Unacked)
	c.unit("<a>", Kept)
	c.write(-1)
	c.lost(3, Resume, 1)
	c.write(-1)
	c.Ack(c.Mark(), c.mode)
	if c.strikes != nil {
		t.Error("got memory held while nothing is stored")
	}
}
