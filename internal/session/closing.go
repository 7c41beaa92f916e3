package session

import (
	"time"

	"github.com/holdfast-proxy/caddy-holdfast/internal/frame"
	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
	"github.com/holdfast-proxy/caddy-holdfast/internal/sock"
)

// The close codes that the session sends of its own (RFC 6455 §7.4.1 and the
// IANA registry).
const (
	codeNone            = 0 // no close frame: the peer is gone, or gets the other's
	codeGoingAway       = 1001
	codeProtocolError   = 1002
	codePolicyViolation = 1008
	codeTooBig          = 1009
	codeInternalError   = 1011
	codeServiceRestart  = 1012
	codeTryAgainLater   = 1013
	codeBadGateway      = 1014
)

// farewell is what the peers get when a session ends for a reason.
type farewell struct {
	client, backend uint16
	text            string // for the client
}

// farewells says what the peers get, by reason. What is not in here are close
// frames of a peer, which are passed on as they are.
var farewells = map[registry.Reason]farewell{
	registry.ClientGone:     {codeNone, codeGoingAway, ""},
	registry.BackendLost:    {codeBadGateway, codeNone, "backend connection lost"},
	registry.BackendBroke:   {codeBadGateway, codeProtocolError, "backend protocol error"},
	registry.ClientProtocol: {codeProtocolError, codeGoingAway, "protocol error"},
	registry.Idle:           {codeGoingAway, codeGoingAway, "idle"},
	registry.NoData:         {codeGoingAway, codeGoingAway, "no data"},
	registry.Lifetime:       {codeGoingAway, codeGoingAway, "end of lifetime"},
	registry.Orphan:         {codeGoingAway, codeGoingAway, "route removed"},
	registry.PingTimeout:    {codeGoingAway, codeGoingAway, "ping timeout"},
	registry.WriteTimeout:   {codeGoingAway, codeGoingAway, "write timeout"},
	registry.TooBig:         {codeTooBig, codeGoingAway, "message too big"}, // a backend that sent it: see End
	registry.ResumeTimeout:  {codeTryAgainLater, codeNone, "no backend available"},
	registry.Overflow:       {codeTryAgainLater, codeNone, "too many messages while no backend is available"},
	registry.InDoubt:        {codeServiceRestart, codeNone, "delivery of a message is in doubt"},
	registry.Torn:           {codeServiceRestart, codeGoingAway, "a message was cut off"},
	registry.Refused:        {codePolicyViolation, codeNone, "refused by the backend"},
	registry.Poison:         {codeInternalError, codeNone, "a message breaks the backends"},
	registry.Shutdown:       {codeServiceRestart, codeGoingAway, "server shutting down"},
	registry.Admin:          {codeGoingAway, codeGoingAway, ""},
	registry.Pressure:       {codeTryAgainLater, codeGoingAway, "too many connections"},
}

// vanished is the reason when the peer of l is gone without a close frame.
func vanished(l *leg) registry.Reason {
	if l.side == clientSide {
		return registry.ClientGone
	}
	return registry.BackendLost
}

// End leaves close frames with the legs, as the reason wants, and bounds what
// is still being written. The record calls it once its end is decided; a pump that
// leaves may be faster. Only the first call counts.
func (s *Session) End(e registry.Ending) {
	f := farewells[e.Reason]
	if e.Code != 0 {
		f.client = e.Code
	}
	if e.Text != "" {
		f.text = e.Text
	}
	s.mu.Lock()
	if s.closing {
		s.mu.Unlock()
		return
	}
	s.closing = true
	by := s.rec.Deadline()
	s.closingBy = s.now() + time.Until(by)
	s.search.cancel()
	s.search.halt = false
	b := s.backend()
	if e.Reason == registry.TooBig && b.tooBig {
		f.backend = codeTooBig
	}
	s.client.leaveClose(f.client, f.text)
	b.leaveClose(f.backend, "")
	var lost *leg
	switch e.Reason {
	case registry.ClientGone:
		lost = &s.client
	case registry.BackendLost:
		lost = b
	default: // both are there, as far as they were
	}
	if lost != nil {
		lost.gone = true
		lost.cut() // whoever writes there waits for nothing
	}
	_ = s.client.conn.SetWriteDeadline(by)
	_ = b.conn.SetWriteDeadline(by)
	s.wakeUplink()
	s.wakeDownlink()
	s.lookSoon(activePeriod)
	s.mu.Unlock()
}

// leaveClose leaves a close frame with l. Session.mu is held.
func (l *leg) leaveClose(code uint16, text string) {
	if code != codeNone && !l.said {
		l.wantClose, l.closeCode, l.closeText = true, code, text
	}
}

// leaveEcho leaves its own code with a peer that has closed and got no answer.
// Session.mu is held.
func (l *leg) leaveEcho() {
	if l.heard && !l.said && !l.wantClose {
		l.wantClose, l.closeCode, l.closeText = true, l.echo, ""
	}
}

// closeFrom handles a close frame of src: it is passed on as it is, unless dst
// was told another end before or is about to be, or it ends only the backend's part in
// the session.
func (s *Session) closeFrom(src, dst *leg, u *frame.Unit) {
	if src.side == backendSide && s.part(src, u) {
		return
	}
	reason := registry.ClientClosed
	if src.side == backendSide {
		reason = registry.BackendClosed
	}
	s.mu.Lock()
	src.heard, src.echo = true, u.Code
	s.mu.Unlock()
	s.rec.Close(registry.Ending{Reason: reason})
	s.mu.Lock()
	pass := dst.writable() && !dst.wantClose
	if src.parting != 0 && dst.heard {
		// It answers us, who have left it; the client closed meanwhile.
		pass = false
		dst.leaveEcho()
		s.downWork.Store(true)
	}
	if pass {
		dst.said = true
	}
	s.mu.Unlock()
	if pass {
		s.say(dst, u.Wire)
	}
	s.hangUp(src)
}

// say writes the close frame of a leg, its last frame.
func (s *Session) say(l *leg, wire []byte) {
	var before sock.Info
	if l.side == backendSide {
		before, _ = l.ask()
	}
	s.write(l, wire)
	s.mu.Lock()
	l.saidAt, l.early = s.now(), before.Finished
	s.changed.Broadcast()
	s.mu.Unlock()
	s.hangUp(l)
}

// hangUp closes the client's connection as soon as both close frames have
// passed, as a server has to (RFC 6455 §7.1.1): a browser tells its page only
// then, and should not wait for the backend.
func (s *Session) hangUp(l *leg) {
	s.mu.Lock()
	done := l.side == clientSide && l.heard && l.saidAt != 0 && !l.gone
	if done {
		l.gone = true
	}
	s.mu.Unlock()
	if done {
		_ = l.conn.Close()
	}
}

// leave notes that nothing more comes from l, and why: its stream has ended or
// broken. Without a close frame before it, that ends the session, unless there may
// be another backend.
func (s *Session) leave(l *leg, err error) {
	if l.side == backendSide {
		if s.lose(l, s.proof(l, err)) {
			return
		}
	}
	s.mu.Lock()
	l.gone = true
	s.mu.Unlock()
	s.rec.Close(registry.Ending{Reason: vanished(l)})
}

// finishedWith reports whether the pump that reads l is through: the peer's
// stream has ended or, for a client, its close frame has come. A backend closes
// its connection first, as servers do (RFC 6455 §7.1.1), which leaves the
// TIME_WAIT with it.
func (s *Session) finishedWith(l *leg) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return l.gone || l.heard && l.side == clientSide
}

// tellLast makes sure, when the pump from src leaves, that dst was told the end:
// what is left with it or, if the peer that closed gets no answer, its own code.
func (s *Session) tellLast(src, dst *leg) {
	s.End(s.rec.Ending()) // whoever decided it may not have got to that yet
	s.mu.Lock()
	dst.leaveEcho()
	s.mu.Unlock()
	s.serve(dst)
}

// checkClosing looks how far the end has come. It gives a leg up that was told
// the end, has taken all bytes and has said nothing for a second, and cuts both
// at the end of ClosingTimeout. Session.mu is held.
func (s *Session) checkClosing(now time.Duration) (again time.Duration, cut bool) {
	if now >= s.closingBy {
		return closingPeriod, true
	}
	for _, l := range [...]*leg{&s.client, s.backend()} {
		silence := now - max(l.saidAt, time.Duration(l.lastRead.Load()))
		if l.gone || l.saidAt == 0 || silence < answerTimeout {
			continue
		}
		if info, known := l.ask(); !known || info.Unacked == 0 || info.Reset {
			l.gone = true
			if l.side == clientSide {
				s.wakeUplink() // which reads it
			} else {
				s.wakeDownlink()
			}
		}
	}
	return min(closingPeriod, s.closingBy-now), false
}
