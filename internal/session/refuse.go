package session

import (
	"time"

	"github.com/holdfast-proxy/caddy-holdfast/internal/frame"
)

// Refuse takes the place of Run for a session whose record ended before it could
// be opened: both peers are told, and the legs closed. It takes at most a second.
// The record is still its former owner's.
func (s *Session) Refuse() {
	f := farewells[s.rec.Reason()]
	s.mu.Lock()
	s.finished = true
	s.timer.Stop()
	s.mu.Unlock()
	by := time.Now().Add(answerTimeout)
	for side := range s.legs {
		l := &s.legs[side]
		_ = l.conn.SetWriteDeadline(by)
		if side == clientSide && f.client != codeNone {
			_, _ = l.conn.Write(frame.AppendClose(nil, f.client, f.text, false))
		} else if side == backendSide && f.backend != codeNone {
			_, _ = l.conn.Write(frame.AppendClose(nil, f.backend, "", true))
		}
		l.close()
	}
}
