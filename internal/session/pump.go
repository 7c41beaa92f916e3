package session

import (
	"bytes"
	"errors"
	"os"
	"time"

	"github.com/gobwas/ws"

	"github.com/holdfast-proxy/caddy-holdfast/internal/frame"
	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
)

// errHeardClose stops a pump's forwarding: the source's close frame was its last.
var errHeardClose = errors.New("close frame received")

// pump forwards the frames of src to dst, and does the work that is left with
// dst, until src has nothing more to say. It is the only reader of src and the
// only writer of dst.
func (s *Session) pump(src, dst *leg, way registry.Direction) {
	garbled := false // the bytes of src are no frames any more
	for {
		if garbled {
			src.in.Release()
		} else if err := s.forward(src, dst, way); err != nil {
			garbled = true
			if err != errHeardClose {
				s.rec.Close(registry.Ending{Reason: offended(src)})
			}
		}
		if dst.work.Load() {
			s.serve(dst)
		}
		if s.finishedWith(src) {
			break
		}
		switch err := s.fill(src); {
		case err == nil:
		case errors.Is(err, os.ErrDeadlineExceeded):
			// Somebody left work. The deadline is lifted before the work is looked
			// for, and set after it was left: none is missed.
			_ = src.conn.SetReadDeadline(time.Time{})
		default:
			s.leave(src)
		}
	}
	s.tellLast(src, dst)
	src.in.Release()
}

// fill reads what src has, and keeps the times by which the clock judges it.
func (s *Session) fill(src *leg) error {
	if src.reading.Load() == 0 {
		src.reading.Store(int64(s.now()))
	}
	err := src.in.Fill(src.conn)
	if err == nil {
		src.reading.Store(0)
		src.lastRead.Store(int64(s.now()))
		if s.drowsy.Load() {
			s.rouse()
		}
	}
	return err
}

// forward passes on all units that src has ready. Frames that lie side by side
// are written at once.
func (s *Session) forward(src, dst *leg, way registry.Direction) error {
	var b batch
	for {
		u, err := src.in.Next()
		if err != nil || u == nil {
			s.flush(src, dst, way, &b, nil)
			return err
		}
		switch {
		case u.Op == ws.OpClose:
			s.flush(src, dst, way, &b, u)
			s.closeFrom(src, dst, u)
			return errHeardClose
		case u.Op == ws.OpPong && s.ownPong(src, u):
			s.flush(src, dst, way, &b, nil)
		default:
			if !b.add(u) {
				s.flush(src, dst, way, &b, u)
				b.add(u)
			}
		}
	}
}

// batch is a run of units that lie side by side in a Reader's buffer.
type batch struct {
	wire     []byte
	data     int // payload bytes of data frames
	frames   int // data frames
	messages int // ends of messages
}

// add takes u into the batch, or returns false if it lies elsewhere.
func (b *batch) add(u *frame.Unit) bool {
	switch {
	case len(b.wire) == 0:
		b.wire = u.Wire
	case cap(u.Wire) != cap(b.wire)-len(b.wire): // both end with the buffer
		return false
	default:
		b.wire = b.wire[:len(b.wire)+len(u.Wire)]
	}
	if u.Data() {
		b.frames++
		b.data += len(u.Payload)
		if u.Last {
			b.messages++
		}
	}
	return true
}

// flush writes the batch, counts it, and empties it. After dst was told the end
// it is dropped. next is a unit that is to follow, or nil.
func (s *Session) flush(src, dst *leg, way registry.Direction, b *batch, next *frame.Unit) {
	if len(b.wire) > 0 {
		unpassed := src.in.Buffered()
		if next != nil {
			unpassed += len(next.Wire)
		}
		src.unpassed.Store(int64(unpassed))
		if s.mayWrite(dst) {
			// Counted first, so that who sees a message finds it counted.
			if b.frames > 0 {
				s.rec.Count(way, b.data, b.messages)
			}
			s.write(dst, b.wire)
		}
	}
	*b = batch{}
}

// mayWrite reports whether frames still go to l.
func (s *Session) mayWrite(l *leg) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return l.writable()
}

// write writes p to l and returns whether all of it went out. An error does not
// decide about the session: the peer may have sent its reason first, and whoever
// reads l finds that, or its end, within a second. Else the clock decides.
func (s *Session) write(l *leg, p []byte) bool {
	began := s.now()
	l.writing.Store(int64(began))
	if s.drowsy.Load() {
		s.rouse() // should it block
	}
	_, err := l.conn.Write(p)
	if s.now()-began > activePeriod/2 {
		s.other(l).reading.Store(0) // meanwhile nobody read there
	}
	l.writing.Store(0)
	if err == nil {
		return true
	}
	s.mu.Lock()
	if l.broken == 0 {
		l.broken = s.now()
	}
	s.mu.Unlock()
	s.lookIn(activePeriod)
	return false
}

// serve does what was left with dst.
func (s *Session) serve(dst *leg) {
	s.mu.Lock()
	dst.work.Store(false)
	ok := dst.writable()
	ping := dst.wantPing && ok
	dst.wantPing = false
	bye := dst.wantClose && ok
	if bye {
		dst.said = true
	}
	code, text := dst.closeCode, dst.closeText
	s.mu.Unlock()

	masked := dst.side == backendSide
	switch {
	case ping && !bye:
		s.ping(dst, frame.Append(nil, ws.OpPing, s.nonce[:], masked))
	case bye:
		s.say(dst, frame.AppendClose(nil, code, text, masked))
	}
}

// ping writes a heartbeat. While an earlier one is unanswered its times stand:
// the peer's silence counts from there. An upstream that has never answered any
// ping is not judged by this one.
func (s *Session) ping(l *leg, wire []byte) {
	judged := l.side == clientSide || s.upstream.Answers.Load()
	first, began := !s.unanswered(l), s.now()
	if s.write(l, wire) && first && judged {
		l.pingDone.Store(int64(s.now()))
		l.pingBegan.Store(int64(began)) // last: it makes the ping count
	}
}

// ownPong reports whether u answers a ping of the session, and is not passed on.
func (s *Session) ownPong(src *leg, u *frame.Unit) bool {
	if len(u.Payload) != len(s.nonce) || !bytes.Equal(u.Unmasked(), s.nonce[:]) {
		return false
	}
	if src.side == backendSide {
		s.upstream.Answers.Store(true)
	}
	return true
}
