package session

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
	"github.com/holdfast-proxy/caddy-holdfast/internal/replay"
)

// Route is what a session asks of the route it belongs to. Answers follow the
// newest config. All methods may be called from any goroutine.
type Route interface {
	// Settings returns the route's settings. It does not block.
	Settings() *Settings
	// Leaves reports whether live connections are to leave the upstream with a key:
	// it is not one of the route's any more, is drained, or is not healthy where that
	// counts. It does not block.
	Leaves(upstream string) bool
	// Others reports whether a connection of that upstream could go to another one.
	// It does not block.
	Others(upstream string) bool
	// Search begins a search for another backend. Every call of the function it
	// returns chooses an upstream that was not tried before, or begins anew when
	// all were, and dials it.
	Search(i Interruption) func(ctx context.Context) (*Found, error)
	// Lost notes that a backend has gone away by itself. It does not block.
	Lost(upstream *registry.Upstream)
	// Unanswering notes that an upstream has not answered any ping so far.
	Unanswering(upstream *registry.Upstream)
}

// Settings are what a route says about its live sessions. Zero turns a limit
// off. They are not changed once they are handed out.
type Settings struct {
	PingInterval     time.Duration // heartbeats on each leg, up to 10 % sooner
	PingTimeout      time.Duration // silence after a heartbeat that means dead
	IdleTimeout      time.Duration // no data frame either way
	FirstDataTimeout time.Duration // open, but never a data frame
	MaxLifetime      time.Duration // up to 10 % sooner
	WriteTimeout     time.Duration // the peer's kernel takes not one byte

	// The most payload of a message, in bytes on the wire: compressed ones count as
	// they are. A change counts for messages that begin after it.
	ClientMaxMessage int64 // of the client
	ServerMaxMessage int64 // of a backend

	ResumeTimeout time.Duration // how long a client is held without a backend; 0: not at all
	ResumeMin     time.Duration // the first pause before a re-dial is at most so long …
	ResumeMax     time.Duration // … each further one twice that, up to this
	ResumeOn      []uint16      // close codes of a backend that mean it is lost, not the session's end
	ResumeLimit   int           // backends in a row that one message may break; 0: no limit
	Replay        replay.Mode
	ReplayBuffer  int64 // bytes per connection
	ReplayClose   bool  // what does not fit while held ends the session, instead of pausing the client
	DrainWindow   time.Duration
}

// mode is the route's replay mode. Where no client is ever held nothing is kept.
func (s *Settings) mode() replay.Mode {
	if s.ResumeTimeout <= 0 {
		return replay.Off
	}
	return s.Replay
}

// keeps reports whether every message is to arrive, or its loss to be told.
func (s *Settings) keeps() bool { return s.Replay == replay.Unacked || s.Replay == replay.Strict }

// wantsAcks reports whether it matters what a backend has read.
func (s *Settings) wantsAcks() bool { return s.ResumeTimeout > 0 && s.keeps() }

// Interruption is what a backend is told that takes a session over.
type Interruption struct {
	Upstream string // the key of the upstream that is lost or left
	Move     bool   // the old backend still serves; only another upstream will do
	Replayed int    // how many messages at the start may be repeats
	Suspect  bool   // a message may be what breaks backends; see Found.Acquitted
	Cause    uint16 // the close code; 1006: the connection broke, 1001: it is moved
}

// Found is a backend that has accepted the session.
type Found struct {
	Peer
	Upstream *registry.Upstream // a place in its count is taken
	Dial     string             // the address that was dialed
	Discard  func()             // closes the connection and gives the place back

	// Acquitted, if it is not nil, is called once when the backend has read what was
	// suspect, or is gone, or is discarded: other suspects wait for that.
	Acquitted func()
}

// A search ends with these errors; any other one is a reason to try again.
var (
	// ErrNoUpstream: there is none to try or, for a move, none is left.
	ErrNoUpstream = errors.New("no upstream available")
	// ErrNotMovable is the error of Move for a session that cannot move now.
	ErrNotMovable = errors.New("the connection cannot be moved now")
)

// RefusedError is a backend's final refusal to take a session over.
type RefusedError struct{ Status int } // the HTTP status

func (e *RefusedError) Error() string {
	return fmt.Sprintf("the backend refused to take the connection over: status %d", e.Status)
}
