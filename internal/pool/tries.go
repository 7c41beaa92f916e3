// This file holds the way of one connection through the pool: which upstreams it
// tries, and in which order.

package pool

import (
	"context"
	"net"
	"net/http"
	"net/netip"
	"time"

	"github.com/pires/go-proxyproto"

	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
	"github.com/holdfast-proxy/caddy-holdfast/internal/selection"
)

// Client is what an upstream is chosen by, and for whom it is dialed.
type Client struct {
	// Request is the client's, or one made of what is known of the client, with
	// what selection.Prepare gives it.
	Request *http.Request
	Addr    netip.AddrPort
	// TLVs go into a header of the PROXY protocol.
	TLVs []proxyproto.TLV
	// Replace resolves placeholders.
	Replace func(string) string
	// Addresses are the addresses that placeholders made when the connection was
	// opened, by the upstreams' names. Their values may be gone later.
	Addresses map[string]Address
}

// Why says why a connection wants an upstream.
type Why uint8

const (
	Opening  Why = iota
	Resuming     // the upstream Last was lost: it comes after all others
	Moving       // the upstream Last is left: only another one will do
)

// Target is an upstream to dial.
type Target struct {
	Place  *registry.Upstream // taken; who got the target gives it back
	Addr   Address
	Header http.Header // what the policy wants to tell the client
	Dial   func(ctx context.Context) (net.Conn, error)
}

// Tries is a connection's way through the pool.
type Tries struct {
	pool   *Pool
	route  *registry.Route
	client Client
	why    Why
	last   string // the key of the upstream that was lost or is left

	began    time.Time
	attempts int
	tried    map[string]bool // in this round
	ups      []*upstream     // of this round; nil: to be found out
}

// Tries begins a way through the pool.
func (p *Pool) Tries(route *registry.Route, c Client, why Why, last string) *Tries {
	return &Tries{pool: p, route: route, client: c, why: why, last: last, began: time.Now(), tried: make(map[string]bool)}
}

// Next chooses the upstream to try, and takes a place in its count. It returns nil
// if none is left. For a connection that is being opened it waits for one, as long
// as the pool's TryDuration allows.
func (t *Tries) Next(ctx context.Context) *Target {
	for !t.exhausted() {
		if t.ups == nil {
			t.ups = t.pool.upstreams(ctx, &t.client)
		}
		if target := t.choose(); target != nil {
			t.attempts++
			return target
		}
		t.hurry()
		if !t.again(ctx) {
			return nil
		}
	}
	return nil
}

// exhausted reports whether all attempts were made that are allowed.
func (t *Tries) exhausted() bool {
	n := t.pool.Retries
	return t.why == Opening && n != nil && t.attempts > *n
}

// again begins another round, after a pause if there is time for one.
func (t *Tries) again(ctx context.Context) bool {
	p := t.pool
	if t.why != Opening || ctx.Err() != nil {
		return false
	}
	switch {
	case p.TryDuration > 0:
		if time.Since(t.began)+p.TryInterval > p.TryDuration {
			return false
		}
	case p.Retries == nil || len(t.tried) == 0: // Retries may be more than there are upstreams
		return false
	}
	timer := time.NewTimer(p.TryInterval)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
		return false
	}
	clear(t.tried)
	t.ups = nil
	return true
}

// choose has the policy choose among those that come first, and takes a place. It
// returns nil if there is none to choose.
func (t *Tries) choose() *Target {
	var chosen *upstream
	var header http.Header
	candidates := make([]selection.Candidate, len(t.ups))
	place := t.route.Choose(func(load func(string) registry.Load) string {
		for _, admits := range t.order() {
			some := false
			for i, u := range t.ups {
				l := load(u.key)
				ok := !t.tried[u.key] && admits(u, l)
				some = some || ok
				candidates[i] = selection.Candidate{Upstream: u.policy, Conns: l.Conns, Available: ok}
			}
			if !some {
				continue
			}
			i, h := t.pool.Policy.Choose(candidates, t.client.Request)
			if i >= 0 {
				chosen, header = t.ups[i], h
				return chosen.key
			}
		}
		return ""
	})
	if place == nil {
		return nil
	}
	t.tried[chosen.key] = true
	if chosen.fresh {
		t.pool.hand(chosen)
	}
	return &Target{Place: place, Addr: chosen.addr, Header: header, Dial: func(ctx context.Context) (net.Conn, error) {
		if chosen.err != nil {
			return nil, chosen.err
		}
		return t.pool.Connect(ctx, chosen.addr, "", &t.client)
	}}
}

// rule says whether an upstream with that load may be chosen.
type rule func(u *upstream, l registry.Load) bool

// order returns which upstreams come first, which next.
func (t *Tries) order() []rule {
	good := func(u *upstream, l registry.Load) bool { return t.pool.available(u, l, false) }
	fair := func(u *upstream, l registry.Load) bool { return t.pool.available(u, l, true) }
	others := func(admits rule) rule {
		return func(u *upstream, l registry.Load) bool { return u.key != t.last && admits(u, l) }
	}
	switch t.why {
	case Resuming:
		return []rule{others(good), good, others(fair), fair}
	case Moving:
		return []rule{others(good)}
	default:
		return []rule{good}
	}
}

// hurry has the health checks of those upstreams look that stand in the way.
func (t *Tries) hurry() {
	for _, u := range t.ups {
		if !u.healthy() {
			u.watch.Load().Hurry()
		}
	}
}

// upstreams returns those that there are for a client.
func (p *Pool) upstreams(ctx context.Context, c *Client) []*upstream {
	all := p.static
	if p.Dynamic != nil {
		all = p.dynamic(ctx, c.Request)
	}
	var mine []*upstream // a copy, if one is needed
	for i, u := range all {
		if !u.addr.Varies() {
			continue
		}
		if mine == nil {
			mine = append(mine, all...)
		}
		mine[i] = c.expand(u)
	}
	if mine != nil {
		return mine
	}
	return all
}

// expand returns the upstream that placeholders make for a client.
func (c *Client) expand(u *upstream) *upstream {
	addr, known := c.Addresses[u.addr.Name]
	var err error
	if !known {
		addr, err = u.addr.Expand(c.Replace)
	}
	return &upstream{key: registry.UpstreamKey(u.addr.Name, addr.Dial()), addr: addr, err: err, policy: u.policy, fresh: u.fresh}
}

// Expand returns the addresses that the client's placeholders make, for
// Client.Addresses; nil if the pool has none.
func (p *Pool) Expand(replace func(string) string) map[string]Address {
	var all map[string]Address
	for _, u := range p.static {
		if !u.addr.Varies() {
			continue
		}
		if a, err := u.addr.Expand(replace); err == nil {
			if all == nil {
				all = make(map[string]Address)
			}
			all[a.Name] = a
		}
	}
	return all
}
