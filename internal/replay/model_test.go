// This file drives queues at random against a reference that keeps whole
// messages in a slice. HOLDFAST_SEED repeats one run.

package replay

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
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

// beginWrite marks what there is as sent, or a part of it.
func (l *life) beginWrite(part bool) {
	b := l.backend
	if b == nil || b.broken || l.flight != nil {
		return
	}
	l.copied = nil
	mark := func(p []byte) {
		l.q.Sent(len(p))
		l.flight, l.copied = append(l.flight, p), append(l.copied, p...)
		if !bytes.HasPrefix(b.want[b.sent:], p) {
			l.fatalf("life %d: got other bytes than the next that were to be sent", l.id)
		}
		b.sent += len(p)
	}
	for _, p := range l.hand {
		mark(p)
	}
	l.hand = nil
	for {
		stop := b.sent
		if b.leaving && !slices.ContainsFunc(b.messages, func(m *refMessage) bool { return m.done && m.end() == stop }) && stop > 0 {
			stop = len(b.want)
			for _, m := range slices.Backward(b.messages) {
				if m.done && m.end() > b.sent {
					stop = m.end()
				}
			}
		}
		p := l.q.Pending(b.leaving)
		switch {
		case b.leaving && len(p) > stop-b.sent:
			l.fatalf("life %d: got %d bytes for a backend that is being left, want %d at most", l.id, len(p), stop-b.sent)
		case p == nil && !b.leaving && b.sent < len(b.want), p == nil && b.sent < stop:
			l.fatalf("life %d: got nothing to send, want %d bytes", l.id, len(b.want)-b.sent)
		case p == nil:
			return
		}
		if part {
			mark(p[:1+l.rng.IntN(len(p))])
			return
		}
		mark(p)
	}
}

// endWrite ends a write, well or with an error somewhere in it.
func (l *life) endWrite(well bool) {
	b := l.backend
	if l.flight == nil {
		return
	}
	if !bytes.Equal(bytes.Join(l.flight, nil), l.copied) {
		l.fatalf("life %d: bytes were changed while they were being written", l.id)
	}
	n := len(l.copied)
	if !well {
		n = l.rng.IntN(n)
		l.q.Unsent(len(l.copied) - n)
		b.broken = true
	}
	b.got = append(b.got, l.copied[:n]...)
	l.flight = nil
	for _, m := range b.messages {
		m.ever = m.ever || m.done && m.end() <= len(b.got)
	}
	if !well {
		return
	}
	l.q.Release(l.mode)
	if l.mode != Unacked {
		l.free(func(m *refMessage) bool { return m.done && m.end() <= len(b.got) })
	}
}

func (l *life) free(which func(*refMessage) bool) {
	l.stored = slices.DeleteFunc(l.stored, func(m *refMessage) bool {
		if which(m) {
			m.stored = false
		}
		return !m.stored
	})
}

func (l *life) ping(own bool) {
	b := l.backend
	if b == nil || b.broken {
		return
	}
	l.pingIDs++
	payload := fmt.Appendf(nil, "ping %d", l.pingIDs)
	sent := bytes.Clone(payload)
	room := l.pings.Sent(sent, own, l.q.Mark())
	clear(sent)
	want := len(b.pings) < maxPings
	if !want && own {
		if oldest := slices.IndexFunc(b.pings, func(p refPing) bool { return p.own }); oldest >= 0 {
			b.pings, want = slices.Delete(b.pings, oldest, oldest+1), true
		}
	}
	if room != want {
		l.fatalf("life %d: got room for a ping %t, want %t", l.id, room, want)
	}
	if !room {
		return
	}
	b.pings = append(b.pings, refPing{payload, own, b.sent})
}

// pong lets the backend answer one of the pings that it has read.
func (l *life) pong() {
	b := l.backend
	if m := l.pings.Pong([]byte("unasked")); m.Known || m.Skipped != nil {
		l.fatalf("life %d: got a match of an unasked pong", l.id)
	}
	if b == nil {
		return
	}
	n := 0
	for n < len(b.pings) && b.pings[n].at <= b.read {
		n++
	}
	if n == 0 {
		return
	}
	n = l.rng.IntN(n)
	p := b.pings[n]
	m := l.pings.Pong(p.payload)
	if !m.Known || m.Own != p.own || m.Acked-b.from != uint64(p.at) {
		l.fatalf("life %d: got %+v, want a match of %+v", l.id, m, p)
	}
	l.checkPayloads(m.Skipped, b.pings[:n])
	b.pings = b.pings[n+1:]
	l.q.Ack(m.Acked, l.mode)
	for _, m := range b.messages {
		m.acked = m.acked || m.done && m.end() <= p.at
	}
	l.free(func(m *refMessage) bool { return m.acked })
}

func (l *life) checkPayloads(got [][]byte, of []refPing) {
	for _, p := range of {
		if p.own {
			continue
		}
		if len(got) == 0 || !bytes.Equal(got[0], p.payload) {
			l.fatalf("life %d: got payloads %q, want %q first", l.id, got, p.payload)
		}
		got = got[1:]
	}
	if len(got) > 0 {
		l.fatalf("life %d: got payloads %q too many", l.id, got)
	}
}

// lose breaks the backend.
func (l *life) lose() {
	b := l.backend
	if b == nil {
		return
	}
	l.endWrite(l.rng.IntN(2) == 0)
	l.pong()
	l.checkPayloads(l.pings.Lost(), b.pings)
	l.count()
	want, replayed := l.verdict()
	v, n := l.q.Lost(l.mode, l.lossLimit)
	if v != want || n != replayed {
		l.fatalf("life %d: %v: got verdict %d with %d replayed, want %d with %d", l.id, l.mode, v, n, want, replayed)
	}
	l.verdicts[v]++
	l.backend, l.hand = nil, nil
	if v != Resume {
		l.over = true
		l.q.Drop()
		return
	}
	if l.mode != Unacked {
		l.free(func(m *refMessage) bool { return m.ever })
	}
	if l.open != nil && !l.open.stored {
		l.open, l.givenUp = nil, true
	}
	if !l.q.Boundary() || l.q.Outstanding() || l.q.Backlog() != (len(l.stored) > 0) {
		l.fatalf("life %d: got something begun on a backend that is not there", l.id)
	}
}
