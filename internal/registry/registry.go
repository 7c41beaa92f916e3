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
	byAge    byAge // the same
	routes   map[routeKey]*Route
	stopping bool
	drained  chan struct{} // closed when stopping and the last record is gone
	closed   map[Reason]uint64

	limits     limits
	counted    int // connections that count towards limits.connections
	ipv6Prefix int // of the addresses in byIP of all limits
	pressure   pressure

	watch   Watch
	sweeper *time.Timer // nil until SetWatch

	after []func() // what unlock does
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
	defer r.unlock()
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
	r.byAge.add(c)
	route.byAge.add(c)
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
	for _, c := range r.live(&r.byAge) {
		c.Close(Ending{Reason: Shutdown})
	}
	select {
	case <-r.drained:
		return 0
	case <-ctx.Done():
	}
	left := r.live(&r.byAge)
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

// unlock ends a critical section and then does what it has left to be done without
// the lock.
func (r *Registry) unlock() {
	after := r.after
	r.after = nil
	r.mu.Unlock()
	for _, do := range after {
		do()
	}
}

// remove takes a closed connection out of the index. mu is held.
func (r *Registry) remove(c *Conn) {
	delete(r.byID, c.id)
	r.byAge.remove(c)
	c.route.byAge.remove(c)
	r.count(c.route, r.countedIP(c.route, c.info.Client), -1)
	r.dropUnused(c.route)
	if !c.openedAt.IsZero() {
		r.closed[c.ending.Reason]++
	}
	if r.stopping && len(r.byID) == 0 {
		close(r.drained)
	}
}
