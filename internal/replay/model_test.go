// This file drives queues at random against a reference that keeps whole
// messages in a slice. HOLDFAST_SEED repeats one run.

package replay

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"testing"
)

func TestRandomLives(t *testing.T) {
	first, n := seeds(t, 2000)
	verdicts, fates := map[Verdict]int{}, map[Fate]int{}
	for seed := first; seed < first+n && !t.Failed(); seed++ {
		// No subtest each: there are too many of them.
		at := func(format string, args ...any) {
			t.Helper()
			t.Fatalf("HOLDFAST_SEED=%d: %s", seed, fmt.Sprintf(format, args...))
		}
		liveAtRandom(t, at, rand.New(rand.NewPCG(seed, 5)), verdicts, fates)
	}
	t.Logf("verdicts: %v, fates: %v", verdicts, fates)
	if n > 1 && (len(verdicts) < 4 || len(fates) < 4) {
		t.Errorf("got verdicts %v and fates %v, want all of them: the test is void", verdicts, fates)
	}
}

// seeds returns the first seed and how many, which is one if HOLDFAST_SEED is set.
func seeds(t *testing.T, usual uint64) (first, n uint64) {
	t.Helper()
	s := os.Getenv("HOLDFAST_SEED")
	if s == "" {
		return rand.Uint64N(1 << 32), usual
	}
	first, err := strconv.ParseUint(s, 10, 64)
	if err != nil {
		t.Fatalf("HOLDFAST_SEED: %v", err)
	}
	return first, 1
}

// liveAtRandom runs two queues on one budget.
func liveAtRandom(t *testing.T, fatalf func(string, ...any), rng *rand.Rand, verdicts map[Verdict]int, fates map[Fate]int) {
	t.Helper()
	size := int64(1) << 40
	if rng.IntN(2) == 0 {
		size = 100 + rng.Int64N(20_000)
	}
	w := &world{rng: rng, budget: NewBudget(size), size: size, ample: size == 1<<40, fatalf: fatalf, verdicts: verdicts, fates: fates}
	steady := rng.IntN(2) == 0
	for i := range w.lives {
		l := &life{world: w, id: i, mode: Mode(rng.IntN(4)), steady: steady}
		l.limit = l.randomLimit()
		l.lossLimit = rng.IntN(4)
		l.q.Init(w.budget)
		w.lives[i] = l
	}
	for range 20 + rng.IntN(150) {
		l := w.lives[rng.IntN(2)]
		if !l.over {
			l.step()
			l.observe()
		}
		w.checkMemory()
	}
	w.settle()
	for _, l := range w.lives {
		l.q.Drop()
		l.checkPromise()
	}
	if used := w.budget.Used(); used != 0 {
		fatalf("got %d bytes taken at the end, want 0", used)
	}
}

type world struct {
	rng      *rand.Rand
	budget   *Budget
	size     int64 // of the budget
	ample    bool
	lives    [2]*life
	fatalf   func(string, ...any)
	verdicts map[Verdict]int
	fates    map[Fate]int
}

// life is one client, its queue and its backends.
type life struct {
	*world
	id        int
	q         Queue
	pings     Pings
	mode      Mode
	limit     int64
	lossLimit int
	steady    bool // mode stays
	over      bool

	next     *refUnit // was not taken yet
	inside   bool     // the client is inside a message
	units    int      // of it
	ids      int
	pingIDs  int
	open     *refMessage
	givenUp  bool
	messages []*refMessage
	stored   []*refMessage
	backend  *refBackend

	hand   [][]byte // passed and not sent
	flight [][]byte // being written
	copied []byte   // what it was when that began
}

func (l *life) randomLimit() int64 {
	return []int64{40, 300, 3000, 200_000}[l.rng.IntN(4)] + l.rng.Int64N(100)
}

// step does one thing.
func (l *life) step() {
	b := l.backend
	switch n := l.rng.IntN(100); {
	case n < 40:
		l.offer()
	case n < 65 && b == nil:
		l.resume()
	case n < 55:
		l.beginWrite(l.rng.IntN(3) == 0)
	case n < 72:
		l.endWrite(l.rng.IntN(12) > 0)
	case n < 78 && b != nil && len(b.got) > b.read:
		b.read += 1 + l.rng.IntN(len(b.got)-b.read)
	case n < 80 && b != nil:
		b.read = len(b.got)
	case n < 86:
		l.ping(l.rng.IntN(2) == 0)
	case n < 92:
		l.pong()
	case n < 95 && b != nil:
		b.leaving = true
	case n < 97:
		l.lose()
	case n < 98 && !l.steady:
		l.mode = Mode(l.rng.IntN(4))
	case n < 99:
		l.limit, l.lossLimit = l.randomLimit(), l.rng.IntN(4)
	case !l.ample:
		l.size = 100 + l.rng.Int64N(20_000)
		l.budget.SetLimit(l.size)
	}
}

const unitHeader = 12

// makeUnit makes the client's next unit: number of the message and of the unit,
// length, flags.
func (l *life) makeUnit() *refUnit {
	u := &refUnit{first: !l.inside, last: l.rng.IntN(3) > 0}
	if u.first {
		l.ids, l.units = l.ids+1, 0
	}
	size := l.rng.IntN([]int{20, 20, 20, 20, 200, 200, 200, 2000, 2000, 2000, 2000, 70_000}[l.rng.IntN(12)])
	u.wire = make([]byte, unitHeader+size)
	binary.BigEndian.PutUint32(u.wire, uint32(l.ids))
	binary.BigEndian.PutUint16(u.wire[4:], uint16(l.units))
	if u.last {
		u.wire[6] = 1
	}
	binary.BigEndian.PutUint32(u.wire[8:], uint32(size))
	for i := unitHeader; i < len(u.wire); i++ {
		u.wire[i] = byte(l.ids + l.units + i)
	}
	l.inside = !u.last
	l.units++
	return u
}

// offer appends a unit and checks what becomes of it.
func (l *life) offer() (taken bool) {
	if l.next == nil {
		l.next = l.makeUnit()
	}
	u, b := l.next, l.backend
	live := b != nil && !b.broken && (!b.leaving || !l.q.Boundary())
	wire := bytes.Clone(u.wire)
	got := l.q.Append(wire, u.first, u.last, live, l.mode, l.limit)
	clear(wire) // it is the caller's again
	granted, refused := l.fate(u, live, true), l.fate(u, live, false)
	if got != granted && (l.ample || got != refused) {
		l.fatalf("life %d: got fate %d of a unit of %d bytes, want %d or, without memory, %d", l.id, got, len(u.wire), granted, refused)
	}
	l.fates[got]++
	if got == Full {
		return false
	}
	l.next = nil
	if got != Dropped {
		l.taken(u, got)
	}
	if u.last {
		l.open, l.givenUp = nil, false
	}
	return true
}

func (l *life) resume() {
	b := &refBackend{from: l.q.Mark()}
	for _, m := range l.stored {
		m.start = len(b.want)
		b.messages = append(b.messages, m)
		b.want = append(b.want, m.wire...)
	}
	l.backend = b
	if !l.q.Boundary() {
		l.fatalf("life %d: got no boundary at the start of a backend", l.id)
	}
}
