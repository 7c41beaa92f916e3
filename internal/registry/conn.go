package registry

import (
	"container/list"
	"net/netip"
	"sync/atomic"
	"time"
)

// ClosingTimeout is how long a connection may stay in Closing.
const ClosingTimeout = 5 * time.Second

// Direction is the way that bytes and messages go.
type Direction uint8

const (
	In  Direction = iota // from the client
	Out                  // to the client
)

// String is the direction's name in metrics.
func (d Direction) String() string { return [...]string{"in", "out"}[d] }

// Owner is what runs a connection: the handshake first, then the session. Its
// methods are called without locks, must not block, and may be called from any
// goroutine, also after the connection has ended.
type Owner interface {
	// End begins the end: the record is in Closing, the peers are to be told.
	End(e Ending)
	// Abort cuts both legs at once.
	Abort()
	// Reconsider is called when the route's settings, or what is planned for the
	// connection, have changed.
	Reconsider()
	// Move begins to bring the connection to another backend and reports whether
	// it may be moved at all.
	Move() error
}

// Info is what is known of a connection when it is accepted.
type Info struct {
	Kind     Kind
	Client   string // the client's IP that Caddy trusts, as ClientIP has it
	Host     string
	URI      string
	SNI      string
	Protocol string // h1
}

// ClientIP is how a client is named: IPv4 also if it is mapped into IPv6, without a
// zone; "" for one without an IP.
func ClientIP(ip netip.Addr) string {
	if !ip.IsValid() {
		return ""
	}
	return ip.Unmap().WithZone("").String()
}

// Conn is the record of one connection. It exists from the moment it is admitted
// to Closed; Registry.mu guards every field but the constants and the counters.
type Conn struct {
	id       string
	info     Info
	route    *Route
	reg      *Registry
	accepted time.Time

	state       State
	since       time.Time // when state was entered
	openedAt    time.Time // zero while Connecting
	deadline    time.Time // when state must have been left; zero: no such time
	closeAt     time.Time // when a paced end is due; zero: none planned
	closeWhy    Ending
	closeAtUp   bool      // that end is only for as long as upstream is this one
	moveAt      time.Time // when a paced move is due; zero: none planned
	ownPlan     bool      // the owner has planned it
	ending      Ending
	owner       Owner
	upstream    *Upstream
	dial        string
	subprotocol string

	inLine    *list.Element // see pressure
	old       bool          // it was told that it is long-lived
	forgotten bool          // the sweeper has cut it

	resumes  int // how often another backend took over …
	replayed int // … and how many messages may have been repeats
	buffered atomic.Int64

	bytes    [2]atomic.Uint64
	messages [2]atomic.Uint64
	lastData atomic.Int64 // Age at the last data frame
}

// ID names the connection in API, logs and the Holdfast-Connection header.
func (c *Conn) ID() string { return c.id }

// Route returns the connection's route.
func (c *Conn) Route() *Route { return c.route }

// Age is the time since the connection was admitted.
func (c *Conn) Age() time.Duration { return time.Since(c.accepted) }

// State returns the connection's state.
func (c *Conn) State() State {
	c.reg.mu.Lock()
	defer c.reg.mu.Unlock()
	return c.state
}

// Attempt notes the upstream that is being dialed, and the time by which it must
// have answered, which is the deadline of Connecting from now on. It takes over
// the place in the upstream's count, which is given back when another attempt or
// the connection's end follows.
func (c *Conn) Attempt(up *Upstream, dial string, deadline time.Time) {
	c.reg.mu.Lock()
	defer c.reg.mu.Unlock()
	if c.closeAtUp && c.upstreamKey() != up.key {
		c.planEnd(time.Time{}, Ending{}, false)
	}
	c.leaveUpstream()
	c.upstream, c.dial, c.deadline = up, dial, deadline
}

// Attempted notes that the attempt is over: what follows, another one or the answer that
// the client gets, has no deadline here.
func (c *Conn) Attempted() {
	c.reg.mu.Lock()
	defer c.reg.mu.Unlock()
	c.deadline = time.Time{}
}

// Deadline is when the connection must have left its state, or zero if that is for
// the route's settings to say.
func (c *Conn) Deadline() time.Time {
	c.reg.mu.Lock()
	defer c.reg.mu.Unlock()
	return c.deadline
}

// Open enters Open: a backend has accepted, and the client is about to be told.
// It returns false if the connection's end came first.
func (c *Conn) Open(subprotocol string) bool {
	c.reg.mu.Lock()
	defer c.reg.mu.Unlock()
	if c.state != Connecting || !c.enter(Open, time.Time{}) {
		return false
	}
	c.subprotocol, c.openedAt = subprotocol, c.since
	c.lastData.Store(int64(c.Age()))
	c.reg.metrics.opened(c)
	return true
}

// Handover gives the connection to another owner. If its end has come already,
// the new owner is told, and has to carry it out like any other.
func (c *Conn) Handover(owner Owner) {
	c.reg.mu.Lock()
	c.owner = owner
	e, ended := c.ending, c.state == Closing
	c.reg.mu.Unlock()
	if ended {
		owner.End(e)
	}
}

// HalfClose enters HalfOpen: one side has ended, the other one may go on for as
// long as the route's settings say. It returns false if the connection is not open.
func (c *Conn) HalfClose() bool {
	c.reg.mu.Lock()
	defer c.reg.mu.Unlock()
	return c.enter(HalfOpen, time.Time{})
}

// Close begins the connection's end. The first call wins; it tells the owner
// and returns true.
func (c *Conn) Close(e Ending) bool {
	c.reg.mu.Lock()
	defer c.reg.unlock()
	return c.close(e)
}

// close is Close with Registry.mu held; the owner is told when that is let go.
func (c *Conn) close(e Ending) bool {
	from := c.state
	if !c.enter(Closing, time.Now().Add(ClosingTimeout)) {
		return false
	}
	c.ending = e
	switch from {
	case Held:
		c.reg.metrics.resumed(c.route, string(e.Reason))
	case Migrating:
		c.reg.metrics.migrated(c.route, string(e.Reason))
	default: // it had its backend
	}
	owner := c.owner
	c.reg.after = append(c.reg.after, func() { owner.End(e) })
	return true
}

// Done removes the record: both legs are closed, no goroutine of it is left.
// Its owner calls it once.
func (c *Conn) Done() {
	c.reg.mu.Lock()
	defer c.reg.unlock()
	c.done()
}

// done is Done with Registry.mu held.
func (c *Conn) done() {
	if !c.enter(Closed, time.Time{}) {
		return
	}
	if log, ok := c.route.Settings.Load().(Log); ok && log.Logs() {
		last := c.view(time.Now())
		c.reg.after = append(c.reg.after, func() { log.Ended(last) })
	}
	c.leaveUpstream()
	if !c.openedAt.IsZero() {
		c.reg.metrics.closed(c)
	}
	c.reg.remove(c)
}

// Log is what a route's Settings may be, to be told of each connection that has
// ended, when nothing of it is left.
type Log interface {
	// Logs reports whether it is to be told at all.
	Logs() bool
	Ended(last View)
}

// CloseAt plans the connection's end, replacing an earlier plan; a zero time
// lifts it.
func (c *Conn) CloseAt(at time.Time, e Ending) {
	c.reg.mu.Lock()
	c.planEnd(at, e, false)
	owner := c.owner
	c.reg.mu.Unlock()
	owner.Reconsider()
}

// leaveAt plans the end of a connection that cannot stay at an upstream, unless it has
// left that, or its end is planned. Another attempt lifts the plan.
func (c *Conn) leaveAt(upstream string, at time.Time, e Ending) {
	c.reg.mu.Lock()
	if c.upstreamKey() == upstream && c.closeAt.IsZero() {
		c.planEnd(at, e, true)
	}
	owner := c.owner
	c.reg.mu.Unlock()
	owner.Reconsider()
}

// planEnd replaces what is planned. Registry.mu is held.
func (c *Conn) planEnd(at time.Time, e Ending, atUp bool) {
	c.closeAt, c.closeWhy, c.closeAtUp = at, e, atUp
}

// PlannedEnd returns what CloseAt planned last.
func (c *Conn) PlannedEnd() (time.Time, Ending) {
	c.reg.mu.Lock()
	defer c.reg.mu.Unlock()
	return c.closeAt, c.closeWhy
}

// Ending returns why the connection ended and what its client is to be told; it
// is zero while the connection lives.
func (c *Conn) Ending() Ending {
	c.reg.mu.Lock()
	defer c.reg.mu.Unlock()
	return c.ending
}

// Count adds to the connection's and its route's totals. This is the one place
// where bytes and messages are counted: bytes are payload bytes of data frames
// as they arrived from the peer that sent them.
func (c *Conn) Count(d Direction, bytes, messages int) {
	c.bytes[d].Add(uint64(bytes))
	c.messages[d].Add(uint64(messages))
	c.lastData.Store(int64(c.Age()))
	c.route.count(d, bytes, messages)
}

// LastData returns the Age at which the last data frame arrived or, before the
// first, at which the connection was opened; and whether there was one.
func (c *Conn) LastData() (at time.Duration, any bool) {
	any = c.messages[In].Load()+c.messages[Out].Load()+c.bytes[In].Load()+c.bytes[Out].Load() > 0
	return time.Duration(c.lastData.Load()), any
}

// enter is the one place where the state changes. It returns false, and changes
// nothing, if the transition is not legal. Registry.mu is held.
func (c *Conn) enter(next State, deadline time.Time) bool {
	if !c.state.mayBecome(next) {
		return false
	}
	c.reg.metrics.moved(c, c.state, next)
	c.lineUp(c.state, next)
	c.state, c.since, c.deadline = next, time.Now(), deadline
	return true
}

// leaveUpstream gives back the place in an upstream's count. Registry.mu is held.
func (c *Conn) leaveUpstream() {
	if c.upstream != nil {
		c.route.release(c.upstream)
		c.upstream, c.dial, c.moveAt = nil, "", time.Time{}
	}
}
