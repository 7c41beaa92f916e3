package registry

import (
	"fmt"
	"slices"
)

// State is where a connection is in its life. Only Conn.enter changes it, along
// the arrows of nextStates.
type State uint8

const (
	Connecting State = iota // a backend is being dialed, the client waits for its answer
	Open                    // both legs are up
	Held                    // there is no backend, the client is kept until there is one
	Migrating               // both legs are up, another backend is about to take over
	HalfOpen                // one side has said all it will, the other one goes on
	Closing                 // the end is known, the peers are being told
	Closed                  // nothing of it is left
	stateCount
)

var stateNames = [stateCount]string{"connecting", "open", "held", "migrating", "half_open", "closing", "closed"}

// nextStates are the legal transitions. A connection that ends while it
// connects has nobody to tell and may go straight to Closed.
var nextStates = [stateCount][]State{
	Connecting: {Open, Closing, Closed},
	Open:       {Held, Migrating, HalfOpen, Closing},
	Held:       {Open, Closing},
	Migrating:  {Open, Held, Closing},
	HalfOpen:   {Closing},
	Closing:    {Closed},
}

// String is the state's name in API, logs and metrics.
func (s State) String() string {
	if s < stateCount {
		return stateNames[s]
	}
	return fmt.Sprintf("State(%d)", uint8(s))
}

// ParseState is the inverse of String.
func ParseState(name string) (State, error) {
	for s, n := range stateNames {
		if n == name {
			return State(s), nil
		}
	}
	return 0, fmt.Errorf("unknown state %q", name)
}

func (s State) mayBecome(next State) bool {
	return slices.Contains(nextStates[s], next)
}

// Kind is what carries a connection.
type Kind string

// The kinds are those of websocket_proxy and sni_passthrough.
const (
	WebSocket   Kind = "websocket"
	Passthrough Kind = "passthrough"
)

// Reason says why a connection ended: the first one given wins, and is what
// log, metric and API show.
type Reason string

// The reasons of WebSockets. What either peer gets is in package session.
const (
	ClientClosed   Reason = "client_closed"   // a close frame of the client
	ClientGone     Reason = "client_gone"     // FIN or RST of the client without one
	BackendClosed  Reason = "backend_closed"  // a close frame of the backend
	BackendLost    Reason = "backend_lost"    // the backend's connection broke or went dead
	ClientProtocol Reason = "client_protocol" // the client broke RFC 6455
	BackendBroke   Reason = "backend_protocol"
	Idle           Reason = "idle"           // idle_timeout
	NoData         Reason = "no_data"        // first_data_timeout
	Lifetime       Reason = "lifetime"       // max_lifetime
	PingTimeout    Reason = "ping_timeout"   // the client answers no ping
	WriteTimeout   Reason = "write_timeout"  // the client takes no byte
	TooBig         Reason = "too_big"        // a message larger than its sender's limit
	ResumeTimeout  Reason = "resume_timeout" // held for too long
	Overflow       Reason = "overflow"       // held, and its messages do not fit any more
	InDoubt        Reason = "in_doubt"       // nobody knows whether a message was delivered
	Torn           Reason = "torn"           // a message was delivered in part and cannot be repaired
	Refused        Reason = "refused"        // a backend refused to take the connection over
	Poison         Reason = "poison"         // its message breaks every backend
	Orphan         Reason = "orphan"         // its route is gone from the config
	Shutdown       Reason = "shutdown"       // Caddy stops
	Admin          Reason = "admin"          // the admin API
	Pressure       Reason = "pressure"       // it was ending, and room was needed
)

// The reasons of passthrough connections, beside Idle, Lifetime and others that
// the two kinds share. What either peer gets is in package tunnel.
const (
	EOF             Reason = "eof"       // both sides have ended
	Reset           Reason = "reset"     // a peer broke the connection off
	Dead            Reason = "dead"      // keep-alive or user timeout: a peer is not there any more
	HalfOpenTimeout Reason = "half_open" // half_open_timeout
	Stuck           Reason = "stuck"     // stuck_timeout
	Dial            Reason = "dial"      // no upstream could be connected to
	Unhealthy       Reason = "unhealthy" // close_if_unhealthy
)

// Ending is the reason for a connection's end and, for Admin, what the client is told.
type Ending struct {
	Reason Reason
	Code   uint16 // close code for the client; 0: the reason's own
	Text   string // close reason for the client; "": the reason's own
}
