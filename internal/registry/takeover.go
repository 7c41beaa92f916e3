// This file holds what happens to a record between two backends: held without
// one, moved to another one, taken over by it.

package registry

import (
	"time"

	"github.com/holdfast-proxy/caddy-holdfast/internal/replay"
)

// Hold enters Held: the backend is gone. It gives the place in the upstream's
// count back, and returns false if the connection's end came first. Being held
// already is no error.
func (c *Conn) Hold() bool {
	c.reg.mu.Lock()
	defer c.reg.mu.Unlock()
	if c.state != Held && !c.enter(Held, time.Time{}) {
		return false
	}
	c.leaveUpstream()
	return true
}

// Migrate enters Migrating: another backend is being looked for while the old
// one still serves. It returns false if the connection is not open.
func (c *Conn) Migrate() bool {
	c.reg.mu.Lock()
	defer c.reg.mu.Unlock()
	return c.enter(Migrating, time.Time{})
}

// Stay ends a migration for which there was no other backend.
func (c *Conn) Stay() {
	c.reg.mu.Lock()
	defer c.reg.mu.Unlock()
	if c.state == Migrating {
		c.enter(Open, time.Time{})
		c.reg.metrics.migrated(c.route, "stayed")
	}
}

// TakeOver enters Open again: another backend has the connection, of whose first
// messages as many as replayed may be repeats. It takes over the place in the
// upstream's count. It returns false, and leaves the place with the caller, if
// the connection's end came first.
func (c *Conn) TakeOver(up *Upstream, dial string, replayed int) bool {
	c.reg.mu.Lock()
	defer c.reg.mu.Unlock()
	moved := c.state == Migrating
	if c.state != Held && !moved || !c.enter(Open, time.Time{}) {
		return false
	}
	c.leaveUpstream()
	c.upstream, c.dial = up, dial
	c.resumes++
	c.replayed += replayed
	if moved {
		c.reg.metrics.migrated(c.route, "moved")
	} else {
		c.reg.metrics.resumed(c.route, "resumed")
	}
	c.reg.metrics.replayed(c.route, replayed)
	return true
}

// ReplayMemory is what bounds the replay buffers of all connections.
func (c *Conn) ReplayMemory() *replay.Budget { return c.reg.ReplayMemory }

// SetBuffered notes how many bytes are kept for the next backend.
func (c *Conn) SetBuffered(n int64) { c.buffered.Store(n) }

// Move asks the connection's owner to bring it to another backend.
func (c *Conn) Move() error {
	c.reg.mu.Lock()
	owner := c.owner
	c.reg.mu.Unlock()
	return owner.Move()
}

// MoveAt plans a move away from the connection's upstream, replacing an earlier
// plan; a zero time lifts it.
func (c *Conn) MoveAt(at time.Time) { c.moveFrom(c.Upstream(), at) }

// moveFrom plans a move away from an upstream, unless the connection has left it.
func (c *Conn) moveFrom(upstream string, at time.Time) {
	c.reg.mu.Lock()
	if c.upstreamKey() == upstream {
		c.moveAt, c.ownPlan = at, false
	}
	owner := c.owner
	c.reg.mu.Unlock()
	owner.Reconsider()
}

// PlanMove is MoveAt by the owner itself, which has seen that it has to leave its
// upstream, unless there is a plan. It returns what is planned then.
func (c *Conn) PlanMove(at time.Time) time.Time {
	c.reg.mu.Lock()
	defer c.reg.mu.Unlock()
	if c.moveAt.IsZero() {
		c.moveAt, c.ownPlan = at, true
	}
	return c.moveAt
}

// PlannedMove returns what MoveAt planned last.
func (c *Conn) PlannedMove() time.Time {
	c.reg.mu.Lock()
	defer c.reg.mu.Unlock()
	return c.moveAt
}

// needsPlan reports whether no move is planned, only the owner's own one that is yet to
// come, or one that has had its time and was not possible. Registry.mu is held.
func (c *Conn) needsPlan(now time.Time) bool {
	late := now.Sub(c.moveAt)
	return c.moveAt.IsZero() || c.ownPlan && late < 0 || c.state == Open && late > overdueAfter
}

// overdueAfter is how late the owner of a connection may be on a busy machine.
const overdueAfter = time.Second

// Upstream is the key of the upstream that the connection uses or tries; "" while
// it is held.
func (c *Conn) Upstream() string {
	c.reg.mu.Lock()
	defer c.reg.mu.Unlock()
	return c.upstreamKey()
}

func (c *Conn) upstreamKey() string {
	if c.upstream == nil {
		return ""
	}
	return c.upstream.key
}
