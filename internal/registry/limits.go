// This file bounds how many connections there are: in all, of a route, of one client.

package registry

import (
	"fmt"
	"net/netip"
)

// DefaultIPv6Prefix is the part of an IPv6 address, in bits, by which clients are
// told apart: what one customer is usually given, who has all addresses below it.
const DefaultIPv6Prefix = 64

// The limits, as LimitError.Reason and refused_total name them.
const (
	LimitConnections = "max_connections"
	LimitPerIP       = "max_connections_per_ip"
)

// Scope says whose limit it is.
type Scope string

const (
	OfRoute    Scope = "route"
	OfRegistry Scope = "registry"
)

// LimitError is Admit's refusal of a connection for which there is no room.
type LimitError struct {
	Reason string // LimitConnections or LimitPerIP
	Scope  Scope
	Limit  int
}

// Error names the limit, its scope and its value.
func (e *LimitError) Error() string {
	return fmt.Sprintf("%s of the %s is reached: %d", e.Reason, e.Scope, e.Limit)
}

// Limits bound how many connections there may be. nil is not set; what zero means
// depends on the scope.
type Limits struct {
	Connections *int
	PerIP       *int // of one client IP; IPv6 by prefix
}

// SetLimits bounds all connections but those whose route lifts a limit. nil or zero:
// any number. ipv6Prefix is 1 to 128, else the default.
//
// New connections obey at once; no live one is ended. To begin or stop counting by
// IP, or to count by another prefix, all live connections are counted anew, with
// the registry locked: about a microsecond for each.
func (r *Registry) SetLimits(l Limits, ipv6Prefix int) {
	if ipv6Prefix < 1 || ipv6Prefix > 128 {
		ipv6Prefix = DefaultIPv6Prefix
	}
	r.mu.Lock()
	defer r.unlock()
	anew := r.limits.set(l)
	r.feel()
	if r.ipv6Prefix != ipv6Prefix {
		r.ipv6Prefix, anew = ipv6Prefix, true
	}
	if anew {
		r.recount()
	}
}

// SetLimits bounds the route's connections. nil: only by the registry's limit; n: by
// both; zero: by neither, and they do not count towards the registry's. It takes
// effect and costs like Registry.SetLimits, when the route begins or stops to
// count by IP or to lift that limit, and has connections.
func (t *Route) SetLimits(l Limits) {
	r := t.reg
	r.mu.Lock()
	defer r.unlock()
	if !t.lifts.connections {
		r.counted -= t.conns
	}
	if t.lifts.connections = isZero(l.Connections); !t.lifts.connections {
		r.counted += t.conns
	}
	r.feel()
	anew := t.limits.set(l)
	if lifts := isZero(l.PerIP); t.lifts.perIP != lifts {
		t.lifts.perIP, anew = lifts, true
	}
	if anew && t.conns > 0 {
		r.recount()
	}
}

// Refused counts a client that was not served, for a reason of the caller's; Admit
// counts its own refusals. A route that is gone has no metrics any more.
func (t *Route) Refused(reason string) {
	t.reg.mu.Lock()
	defer t.reg.mu.Unlock()
	t.refused(reason)
}

// refused is Refused with Registry.mu held.
func (t *Route) refused(reason string) {
	if t.reg.routes[t.key] == t { // else nobody would delete the series
		t.reg.metrics.refused(t, reason)
	}
}

// refusal is why a connection cannot be admitted now: as refused_total names it, and
// as an error. If the registry's limit is near, others make room. mu is held.
func (r *Registry) refusal(t *Route, ip netip.Addr) (reason string, err error) {
	switch {
	case r.stopping:
		return "stopping", ErrStopping
	case t.declared == 0:
		return "route_gone", ErrRouteGone
	}
	e := r.exceeded(t, ip)
	if e == nil || e.Reason == LimitConnections && e.Scope == OfRegistry {
		r.makeRoom(t)
	}
	if e == nil {
		return "", nil // not e: that would be an error
	}
	return e.Reason, e
}

// exceeded is the limit that one more connection would exceed, or nil. The limits
// per IP come first: the client can do something about those. mu is held.
func (r *Registry) exceeded(t *Route, ip netip.Addr) *LimitError {
	own, all := &t.limits, &r.limits
	switch {
	case full(own.byIP[ip], own.perIP):
		return &LimitError{LimitPerIP, OfRoute, own.perIP}
	case full(all.byIP[ip], all.perIP):
		return &LimitError{LimitPerIP, OfRegistry, all.perIP}
	case full(t.conns, own.connections):
		return &LimitError{LimitConnections, OfRoute, own.connections}
	case full(r.counted, all.connections) && !t.lifts.connections:
		return &LimitError{LimitConnections, OfRegistry, all.connections}
	}
	return nil
}

// count adds n, 1 or -1, to all that a connection counts towards. mu is held.
func (r *Registry) count(t *Route, ip netip.Addr, n int) {
	t.conns += n
	if !t.lifts.connections {
		r.counted += n
		r.feel()
	}
	r.countIP(t, ip, n)
}

func (r *Registry) countIP(t *Route, ip netip.Addr, n int) {
	t.limits.add(ip, n)
	r.limits.add(ip, n)
}

// countedIP is the address that a client is counted by: IPv4 also if it is mapped
// into IPv6, else the prefix. It is the zero Addr, which is not counted, for a client
// without an IP, as on a Unix socket; for a route that lifts the limit, which has
// none of its own then; and if there is no limit, which spares the parsing.
// Records do not keep it: it is the same at their end, because recount follows
// every change of the rules. mu is held.
func (r *Registry) countedIP(t *Route, client string) netip.Addr {
	if t.lifts.perIP || t.limits.byIP == nil && r.limits.byIP == nil {
		return netip.Addr{}
	}
	ip, err := netip.ParseAddr(client)
	if err != nil {
		return netip.Addr{}
	}
	if ip = ip.Unmap(); ip.Is4() {
		return ip
	}
	prefix, _ := ip.Prefix(r.ipv6Prefix) // SetLimits has checked it; the zone is dropped
	return prefix.Addr()
}

// recount counts all live connections by IP, after the rules have changed. mu is held.
func (r *Registry) recount() {
	some := r.limits.restart()
	for _, t := range r.routes {
		some = t.limits.restart() || some
	}
	if !some {
		return
	}
	for _, s := range r.byAge.slots {
		if c := s.conn; c != nil {
			r.countIP(c.route, r.countedIP(c.route, c.info.Client), 1)
		}
	}
}

// lifts are the registry's limits that do not hold for a route.
type lifts struct{ connections, perIP bool }

// limits are those of one scope, where zero is no limit, and its connections by IP.
// Registry.mu guards them.
type limits struct {
	connections int
	perIP       int
	byIP        map[netip.Addr]int // nil while perIP is zero: it costs memory per client
}

// set puts l in force, and reports whether counting by IP begins or ends with it.
func (q *limits) set(l Limits) (turned bool) {
	counted := q.byIP != nil
	q.connections, q.perIP = orZero(l.Connections), orZero(l.PerIP)
	switch {
	case q.perIP == 0:
		q.byIP = nil
	case !counted:
		q.byIP = make(map[netip.Addr]int)
	}
	return counted != (q.byIP != nil)
}

// restart forgets what was counted by IP, and reports whether that is counted at all.
func (q *limits) restart() bool {
	if q.byIP == nil {
		return false
	}
	q.byIP = make(map[netip.Addr]int)
	return true
}

func (q *limits) add(ip netip.Addr, n int) {
	if q.byIP == nil || !ip.IsValid() {
		return
	}
	if n += q.byIP[ip]; n == 0 {
		delete(q.byIP, ip)
	} else {
		q.byIP[ip] = n
	}
}

// full reports whether n connections are all that the limit allows.
func full(n, limit int) bool { return limit > 0 && n >= limit }

func isZero(n *int) bool { return n != nil && *n == 0 }

func orZero(n *int) int {
	if n == nil {
		return 0
	}
	return *n
}

// Interface guard
var _ error = (*LimitError)(nil)
