// This file holds what both pumps share: reading a leg, batches, writing a leg,
// and the work that is left with it.

package session

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"time"

	"github.com/gobwas/ws"

	"github.com/holdfast-proxy/caddy-holdfast/internal/frame"
)

// fill reads what src has, keeps the times by which the clock judges it, and
// returns why nothing more will come. A wake-up is no such reason.
func (s *Session) fill(src *leg) error {
	if src.reading.Load() == 0 {
		src.reading.Store(int64(s.now()))
	}
	err := src.in.Fill(src.conn)
	if err == io.EOF && src.side == backendSide {
		err = s.streamEnd(src)
	}
	switch {
	case err == nil:
		src.reading.Store(0)
		src.lastRead.Store(int64(s.now()))
		if s.drowsy.Load() {
			s.rouse()
		}
		return nil
	case errors.Is(err, os.ErrDeadlineExceeded):
		// Somebody left work. The deadline is lifted before the work is looked
		// for, and set after it was left: none is missed.
		_ = src.conn.SetReadDeadline(time.Time{})
		return nil
	default:
		return err
	}
}

// batch is a run of units that lie side by side in a Reader's buffer.
type batch struct {
	wire     []byte
	data     int // payload bytes of data frames
	frames   int // data frames
	messages int // ends of messages
}

// fits reports whether u lies right behind the batch.
func (b *batch) fits(u *frame.Unit) bool {
	return len(b.wire) == 0 || cap(u.Wire) == cap(b.wire)-len(b.wire) // both end with the buffer
}

// add takes u, which fits, into the batch.
func (b *batch) add(u *frame.Unit) {
	if len(b.wire) == 0 {
		b.wire = u.Wire
	} else {
		b.wire = b.wire[:len(b.wire)+len(u.Wire)]
	}
	if u.Data() {
		b.frames++
		b.data += len(u.Payload)
		if u.Last {
			b.messages++
		}
	}
}

// slowWrite is how long a write takes that has to wait for the peer.
const slowWrite = activePeriod / 10

// write writes p to l and returns how much of it went out. An error does not
// decide about the session: the peer may have sent its reason first, and whoever
// reads l finds that, or its end, within a second. Else the clock decides.
func (s *Session) write(l *leg, p []byte) (n int, ok bool) {
	began := s.now()
	l.writing.Store(int64(began))
	if s.drowsy.Load() {
		s.rouse() // should it block
	}
	n, err := l.conn.Write(p)
	if now := s.now(); now-began > slowWrite {
		l.slow.Store(int64(now))
		if now-began > activePeriod/2 {
			s.other(l).reading.Store(0) // meanwhile nobody read there
		}
	}
	l.writing.Store(0)
	if err == nil {
		return n, true
	}
	s.mu.Lock()
	if l.broken == 0 {
		l.broken = s.now()
	}
	s.lookSoon(activePeriod)
	s.mu.Unlock()
	return n, false
}

// serve does what was left with dst.
func (s *Session) serve(dst *leg) {
	s.mu.Lock()
	ok := dst.writable()
	ping := dst.wantPing && ok
	dst.wantPing = false
	bye := dst.wantClose && ok
	if bye {
		dst.said = true
	}
	code, text := dst.closeCode, dst.closeText
	s.mu.Unlock()

	if bye {
		s.say(dst, frame.AppendClose(nil, code, text, dst.side == backendSide))
		return
	}
	if !ping {
		return
	}
	wire := s.newPing(dst)
	// While an earlier ping is unanswered its times stand: the peer's silence counts
	// from there. An upstream that has never answered any ping is not judged by it.
	judged := dst.side == clientSide || dst.upstream.Answers.Load()
	first, began := !s.unanswered(dst), s.now()
	if _, ok := s.write(dst, wire); ok && first && judged {
		dst.pingDone.Store(int64(s.now()))
		dst.pingBegan.Store(int64(began)) // last: it makes the ping count
	}
}

// newPing makes a heartbeat, which for a backend asks as well what it has read.
func (s *Session) newPing(l *leg) []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	payload := s.own.next()
	if l.side == backendSide {
		s.pings.Sent(payload, true, s.queue.Mark())
		l.lastPing, l.pingMark = s.now(), s.queue.Mark()
		if l.pinged == 0 {
			l.pinged = l.lastPing
		}
		l.nextPing = l.lastPing + s.sooner(s.route.Settings().PingInterval) // it is a heartbeat as well
	}
	return frame.Append(nil, ws.OpPing, payload, l.side == backendSide)
}

// ownPings are the payloads of the session's own pings: a nonce, which tells
// them from others, and a number.
type ownPings struct {
	nonce [8]byte
	last  uint64 // guarded by Session.mu
}

func (o *ownPings) next() []byte {
	o.last++
	return binary.BigEndian.AppendUint64(bytes.Clone(o.nonce[:]), o.last)
}

func (o *ownPings) has(payload []byte) bool {
	return len(payload) == len(o.nonce)+8 && bytes.Equal(payload[:len(o.nonce)], o.nonce[:])
}

// mostPongs bounds the answers that wait for a client that does not read: more
// recent pings speak for earlier ones (RFC 6455 §5.5.3).
const mostPongs = 64

// answer leaves an answer to a ping of the client with the downlink. Session.mu
// is held.
func (s *Session) answer(payload []byte) {
	if len(s.pongs) == mostPongs {
		s.pongs = s.pongs[1:]
	}
	s.pongs = append(s.pongs, payload)
	s.wakeDownlink()
}
