// This file is the backends' part of a life at random: writes to them, their pings and
// pongs, and their loss.

package replay

import (
	"bytes"
	"fmt"
	"slices"
)

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
	full := len(b.pings) >= maxPings
	if full && own {
		if oldest := slices.IndexFunc(b.pings, func(p refPing) bool { return p.own }); oldest >= 0 {
			b.pings = slices.Delete(b.pings, oldest, oldest+1)
		}
	}
	if want := own || !full; room != want {
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
