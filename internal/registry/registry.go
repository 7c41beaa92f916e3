// Package registry knows every live connection of the process: its record, its
// state, its end. It outlives every config, so that a reload keeps it.
//
// One mutex, Registry.mu, guards the index, the routes, the upstreams' counts
// and every record's state; it is never held over I/O or a call to an Owner.
// Relaying a message takes no lock: counters are atomic.
//
// Invariants:
//   - A record is in the index from Admit to Done, and Done is called once.
//   - A record's state only follows nextStates; Close has one winner.
//   - A place in an upstream's count is held by at most one record and given
//     back exactly once.
//   - From Admit to Done a record counts towards every limit that holds for it,
//     also after these have changed.
package registry

import (
	"context"
	"errors"
	"math"
	"math/rand/v2"
	"sort"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/holdfast-proxy/caddy-holdfast/internal/replay"
)

// Admit refuses connections with these errors, and with LimitError.
var (
	ErrStopping  = errors.New("the server is stopping")
	ErrRouteGone = errors.New("the route is gone from the configuration")
)

// Registry is the set of live connections. Make one with New.
type Registry struct {
	// ReplayMemory bounds the replay buffers of all connections together.
	ReplayMemory *replay.Budget

	metrics *metrics

	mu       sync.Mutex
	byID     map[string]*Conn
	order    []slot // by age; the slots of connections that ended are empty
	dead     int    // empty slots in order
	routes   map[routeKey]*Route
	stopping bool
	drained  chan struct{} // closed when stopping and the last record is gone
	closed   map[Reason]uint64

	limits     limits
	counted    int // connections that count towards limits.connections
	ipv6Prefix int // of the addresses in byIP of all limits
}

// slot keeps a connection's place in the order of age. IDs grow with age, so a
// page can go on after a connection that is gone.
type slot struct {
	id   string
	conn *Conn
}

// New returns an empty registry.
func New() *Registry {
	memory := replay.NewBudget(math.MaxInt64)
	return &Registry{
		ReplayMemory: memory,

		metrics: newMetrics(memory.Used),
		byID:    make(map[string]*Conn),
		routes:  make(map[routeKey]*Route),
		drained: make(chan struct{}),
		closed:  make(map[Reason]uint64),

		ipv6Prefix: DefaultIPv6Prefix,
	}
}

// Collectors returns the registry's metrics. They are the same ones at every
// call and are registered in the metrics registry of every config.
func (r *Registry) Collectors() []prometheus.Collector {
	return append(r.metrics.collectors(), &upstreamCollector{r})
}

// Admit makes the record of a connection that is about to be dialed. The owner
// is told when its end comes first. A refusal is ErrStopping, ErrRouteGone or a
// *LimitError, and is counted.
func (r *Registry) Admit(route *Route, info Info, owner Owner) (*Conn, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	ip := r.countedIP(route, info.Client)
	if reason, err := r.refusal(route, ip); err != nil {
		route.refused(reason)
		return nil, err
	}
	// Version 7 is ordered by time and, in one process, strictly growing.
	id, err := uuid.NewV7()
	if err != nil {
		return nil, err
	}
	c := &Conn{
		id: id.String(), info: info, route: route, reg: r,
		accepted: time.Now(), state: Connecting, owner: owner,
	}
	c.since = c.accepted
	r.byID[c.id] = c
	r.order = append(r.order, slot{c.id, c})
	r.count(route, ip, 1)
	r.metrics.admitted(c)
	return c, nil
}

// Get returns a live connection.
func (r *Registry) Get(id string) (*Conn, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	c, ok := r.byID[id]
	return c, ok
}

// Len returns the number of live connections.
func (r *Registry) Len() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.byID)
}

// Shutdown ends all connections and admits no more. It returns as soon as none
// is left. When ctx ends before that, those left are cut, and it returns without
// waiting for them. What it returns is how many were cut.
func (r *Registry) Shutdown(ctx context.Context) (cut int) {
	r.mu.Lock()
	first := !r.stopping
	r.stopping = true
	if first && len(r.byID) == 0 {
		close(r.drained)
	}
	r.mu.Unlock()
	for _, c := range r.live(nil) {
		c.Close(Ending{Reason: Shutdown})
	}
	select {
	case <-r.drained:
		return 0
	case <-ctx.Done():
	}
	left := r.live(nil)
	for _, c := range left {
		c.abort()
	}
	return len(left)
}

// abort cuts the connection's legs.
func (c *Conn) abort() {
	c.reg.mu.Lock()
	owner := c.owner
	c.reg.mu.Unlock()
	owner.Abort()
}

// EndPaced ends the connections of a route evenly within window, in random
// order and with the last one due when it ends, so that their clients do not
// all return at once.
func (r *Registry) EndPaced(route *Route, window time.Duration, e Ending) int {
	conns := r.live(route)
	paced(conns, window, func(c *Conn, at time.Time) { c.CloseAt(at, e) })
	return len(conns)
}

// MovePaced plans for the connections of a route that use an upstream which
// leaves to move to another one, spread like those of EndPaced, and lifts
// such plans for all others. Those that found no other when their time came are
// spread again, lest they all go at once when there is one. It returns how many are
// to move.
func (r *Registry) MovePaced(route *Route, leaves func(upstream string) bool, window time.Duration) int {
	var leaving []*Conn
	from := make(map[*Conn]string)
	for _, c := range r.live(route) {
		up, planned := c.Upstream(), !c.PlannedMove().IsZero()
		switch {
		case up != "" && leaves(up):
			if !planned || c.moveOverdue() {
				leaving = append(leaving, c)
				from[c] = up
			}
		case planned:
			c.moveFrom(up, time.Time{})
		}
	}
	paced(leaving, window, func(c *Conn, at time.Time) { c.moveFrom(from[c], at) })
	return len(leaving)
}

// paced gives each connection a time within window, evenly, in random order, the
// last one when it ends.
func paced(conns []*Conn, window time.Duration, plan func(c *Conn, at time.Time)) {
	rand.Shuffle(len(conns), func(i, j int) { conns[i], conns[j] = conns[j], conns[i] })
	now := time.Now()
	for i, c := range conns {
		share := float64(i+1) / float64(len(conns)) // a product of integers could overflow
		plan(c, now.Add(time.Duration(share*float64(window))))
	}
}

// EndLeaving ends the connections of a route that use an upstream which leaves, for
// the reason that leaves gives, spread like those of EndPaced. Those whose end is
// planned keep that plan, but for one whose upstream was Unhealthy and is to be
// left no more. It returns how many were added.
func (r *Registry) EndLeaving(route *Route, leaves func(upstream string) Reason, window time.Duration) int {
	var leaving []*Conn
	why := make(map[*Conn]Ending)
	for _, c := range r.live(route) {
		var reason Reason
		if up := c.Upstream(); up != "" {
			reason = leaves(up)
		}
		at, planned := c.PlannedEnd()
		switch {
		case reason != "" && at.IsZero():
			leaving = append(leaving, c)
			why[c] = Ending{Reason: reason}
		case reason == "" && !at.IsZero() && planned.Reason == Unhealthy:
			c.CloseAt(time.Time{}, Ending{})
		}
	}
	paced(leaving, window, func(c *Conn, at time.Time) { c.CloseAt(at, why[c]) })
	return len(leaving)
}

// KeepAll lifts what EndPaced and EndLeaving planned for connections of a route
// that may stay at their upstream.
func (r *Registry) KeepAll(route *Route, stays func(upstream string) bool) {
	for _, c := range r.live(route) {
		if at, _ := c.PlannedEnd(); !at.IsZero() && stays(c.Upstream()) {
			c.CloseAt(time.Time{}, Ending{})
		}
	}
}

// ReconsiderAll tells the owners of a route's connections that its settings
// have changed.
func (r *Registry) ReconsiderAll(route *Route) {
	for _, c := range r.live(route) {
		c.reg.mu.Lock()
		owner := c.owner
		c.reg.mu.Unlock()
		owner.Reconsider()
	}
}

// live returns the connections of a route, or all for nil.
func (r *Registry) live(route *Route) []*Conn {
	r.mu.Lock()
	defer r.mu.Unlock()
	conns := make([]*Conn, 0, len(r.byID))
	for _, s := range r.order {
		if s.conn != nil && (route == nil || s.conn.route == route) {
			conns = append(conns, s.conn)
		}
	}
	return conns
}

// remove takes a closed connection out of the index. mu is held.
func (r *Registry) remove(c *Conn) {
	delete(r.byID, c.id)
	i := r.indexAfter(c.id) - 1
	r.order[i].conn = nil
	r.dead++
	if r.dead > len(r.byID)+64 {
		r.compact()
	}
	r.count(c.route, r.countedIP(c.route, c.info.Client), -1)
	r.dropUnused(c.route)
	if !c.openedAt.IsZero() {
		r.closed[c.ending.Reason]++
	}
	if r.stopping && len(r.byID) == 0 {
		close(r.drained)
	}
}

// indexAfter returns the index in order of the first slot younger than id. mu is held.
func (r *Registry) indexAfter(id string) int {
	return sort.Search(len(r.order), func(i int) bool { return r.order[i].id > id })
}

// compact drops the empty slots; as many ended as are left, so its cost is
// spread over them. mu is held.
func (r *Registry) compact() {
	kept := make([]slot, 0, 2*len(r.byID)+64)
	for _, s := range r.order {
		if s.conn != nil {
			kept = append(kept, s)
		}
	}
	r.order, r.dead = kept, 0
}
