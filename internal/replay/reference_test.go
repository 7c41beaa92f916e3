// This file holds the reference that random lives are compared with.

package replay

import "encoding/binary"

// refMessage is a client's message in the reference.
type refMessage struct {
	id     int
	wire   []byte
	done   bool // the client has ended it
	stored bool
	stream bool // it is not stored because of its size
	ever   bool // a backend got all of it
	acked  bool
	struck int // how many backends in a row got it and broke

	start        int // where it begins on the current backend
	wholes, read int // how many backends got and read all of it
}

func (m *refMessage) end() int { return m.start + len(m.wire) }

// refBackend is what the current backend is to get, and what it got.
type refBackend struct {
	messages []*refMessage
	want     []byte
	sent     int // marked
	got      []byte
	read     int
	broken   bool
	leaving  bool
	from     uint64 // Mark at its begin
	pings    []refPing
}

type refPing struct {
	payload []byte
	own     bool
	at      int
}

type refUnit struct {
	wire        []byte
	first, last bool
}

// fate is what is to become of a unit.
func (l *life) fate(u *refUnit, live, granted bool) Fate {
	bytes, size := int64(l.bytesStored()), int64(len(u.wire))
	memory := size
	if u.last {
		memory += 64
	}
	allSent := l.backend != nil && l.backend.sent == len(l.backend.want)
	ifLive := func(may bool) Fate {
		if may && live {
			return Passed
		}
		return Full
	}
	switch {
	case l.givenUp:
		return Dropped
	case l.open != nil && !l.open.stored:
		return ifLive(true)
	case u.first && l.mode == Off:
		return ifLive(bytes == 0 || allSent)
	case granted && bytes+size <= l.limit:
		return Kept
	case !allSent:
		return Full
	case l.open != nil:
		return ifLive(len(l.stored) == 1)
	default:
		return ifLive(bytes == 0 && (size > l.limit || memory > l.size))
	}
}

func (l *life) taken(u *refUnit, f Fate) {
	b := l.backend
	if u.first {
		l.open = &refMessage{id: len(l.messages), stored: f == Kept, stream: f == Passed && l.mode != Off}
		l.messages = append(l.messages, l.open)
		if b != nil {
			l.open.start = len(b.want)
			b.messages = append(b.messages, l.open)
		}
		if f == Kept {
			l.stored = append(l.stored, l.open)
		}
	}
	m := l.open
	m.wire = append(m.wire, u.wire...)
	m.done = u.last
	if b != nil {
		b.want = append(b.want, u.wire...)
	}
	if f == Passed {
		l.hand = append(l.hand, u.wire)
		m.stream = m.stream || m.stored
		for _, s := range l.stored {
			s.stored = false
		}
		l.stored = nil
	}
}

func (l *life) bytesStored() (n int) {
	for _, m := range l.stored {
		n += len(m.wire)
	}
	return n
}

// count adds up what the current backend got and read.
func (l *life) count() {
	b := l.backend
	l.checkLog(b.got)
	for _, m := range b.messages {
		if m.done && m.end() <= len(b.got) {
			m.wholes++
		}
		if m.done && m.end() <= b.read {
			m.read++
		}
	}
}

// checkLog parses what a backend got: messages whose units are all there and in
// order, and the beginning of one at the end.
func (l *life) checkLog(got []byte) {
	message, unit, inside := 0, 0, false
	for len(got) >= unitHeader {
		id, number := int(binary.BigEndian.Uint32(got)), int(binary.BigEndian.Uint16(got[4:]))
		if !inside && (id <= message || number != 0) || inside && (id != message || number != unit) {
			l.fatalf("life %d: got unit %d of message %d after unit %d of %d (inside: %t)", l.id, number, id, unit, message, inside)
		}
		message, unit, inside = id, number+1, got[6] == 0
		size := unitHeader + int(binary.BigEndian.Uint32(got[8:]))
		got = got[min(size, len(got)):]
	}
}

func (l *life) verdict() (Verdict, int) {
	b := l.backend
	torn, doubt, struck, replayed := false, false, 0, 0
	for _, m := range b.messages {
		whole := m.done && m.end() <= len(b.got)
		torn = torn || !m.stored && !whole
		doubt = doubt || l.mode == Strict && (whole || m.ever) && !m.acked ||
			l.mode == Unacked && whole && m.stream && !m.acked
		switch {
		case l.mode != Unacked || l.lossLimit == 0 || !whole:
			m.struck = 0
		case m.stored:
			m.struck++
			struck = max(struck, m.struck)
		}
		if l.mode == Unacked && m.stored && m.ever {
			replayed++
		}
	}
	switch {
	case l.mode == Off:
		return Resume, 0
	case torn:
		return Torn, 0
	case doubt:
		return InDoubt, 0
	case l.lossLimit > 0 && struck >= l.lossLimit:
		return Poison, 0
	default:
		return Resume, replayed
	}
}

// observe compares what the queue says of itself.
func (l *life) observe() {
	b := l.backend
	if l.over || b != nil && b.broken {
		return
	}
	if got, want := l.q.Buffered(), int64(l.bytesStored()); got != want {
		l.fatalf("life %d: got %d bytes stored, want %d", l.id, got, want)
	}
	if got, want := l.q.Empty(), len(l.stored) == 0 && l.open == nil; got != want {
		l.fatalf("life %d: got empty %t, want %t", l.id, got, want)
	}
	if b == nil || len(l.hand) > 0 {
		return
	}
	boundary, outstanding := b.sent == 0, false
	for _, m := range b.messages {
		boundary = boundary || m.done && m.end() == b.sent
		outstanding = outstanding || m.done && m.end() <= b.sent && !m.acked
	}
	if got := l.q.Boundary(); got != boundary {
		l.fatalf("life %d: got boundary %t, want %t", l.id, got, boundary)
	}
	if got := l.q.Outstanding(); got != outstanding {
		l.fatalf("life %d: got outstanding %t, want %t", l.id, got, outstanding)
	}
	if got, want := l.q.Backlog(), b.sent < len(b.want); got != want {
		l.fatalf("life %d: got backlog %t, want %t", l.id, got, want)
	}
	if got, want := l.q.Mark()-b.from, uint64(b.sent); got != want {
		l.fatalf("life %d: got a mark after %d bytes, want %d", l.id, got, want)
	}
}

// checkMemory adds up what the queues hold.
func (w *world) checkMemory() {
	held := int64(0)
	for _, l := range w.lives {
		n := memory(&l.q)
		if n < l.q.Buffered() || n > 0 && l.q.Buffered() == 0 {
			w.fatalf("life %d: got %d bytes of memory for %d stored", l.id, n, l.q.Buffered())
		}
		if w.ample && l.q.Buffered() > 200_100 {
			w.fatalf("life %d: got %d bytes stored, above every limit", l.id, l.q.Buffered())
		}
		held += n
	}
	if used := w.budget.Used(); used != held {
		w.fatalf("got %d bytes taken, want the %d that are held", used, held)
	}
	if w.budget.Used() > 20_100 && !w.ample {
		w.fatalf("got %d bytes taken, above every limit", w.budget.Used())
	}
}

func memory(q *Queue) (n int64) {
	for c := q.stored.head; c != nil; c = c.next {
		n += int64(cap(c.data))
	}
	return n + 8*int64(cap(q.ends.list))
}

// settle lets everything end well: whatever the limits are, all that was begun
// gets through to a backend that reads.
func (w *world) settle() {
	for range 1000 {
		busy := false
		for _, l := range w.lives {
			busy = !l.over && l.settle() || busy
		}
		if !busy {
			return
		}
	}
	w.fatalf("got messages that never get through")
}

func (l *life) settle() (busy bool) {
	if b := l.backend; b != nil && (b.broken || b.leaving) {
		if l.lose(); l.over {
			return false
		}
	}
	if l.backend == nil {
		l.resume()
	}
	for (l.next != nil || l.inside) && l.offer() {
		busy = true
	}
	l.endWrite(true)
	l.beginWrite(false)
	l.endWrite(true)
	l.backend.read = len(l.backend.got)
	l.ping(true)
	p := l.backend.pings[len(l.backend.pings)-1]
	l.q.Ack(l.pings.Pong(p.payload).Acked, l.mode)
	l.backend.pings = nil
	for _, m := range l.backend.messages {
		m.acked = m.acked || m.done
	}
	l.free(func(m *refMessage) bool { return m.acked })
	l.observe()
	return busy || l.next != nil || l.inside || l.q.Buffered() > 0
}

// checkPromise checks what the documentation promises for each mode, for
// clients that were not ended and whose mode stayed the same.
func (l *life) checkPromise() {
	if l.over {
		return
	}
	l.count()
	for _, m := range l.messages {
		ok := true
		if l.steady {
			switch l.mode {
			case Unacked:
				ok = m.read >= 1
			case Unsent:
				ok = m.wholes == 1
			case Strict:
				ok = m.wholes == 1 && m.read == 1
			case Off:
				ok = m.wholes <= 1
			}
		}
		if !ok {
			l.fatalf("life %d: %v: message %d was written %d times and read %d times", l.id, l.mode, m.id, m.wholes, m.read)
		}
	}
}
