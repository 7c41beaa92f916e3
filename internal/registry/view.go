package registry

import (
	"maps"
	"strconv"
	"time"
)

// View is a connection as the admin API shows it. Durations are in seconds.
type View struct {
	ID          string    `json:"id"`
	Kind        Kind      `json:"kind"`
	Route       string    `json:"route"`
	State       string    `json:"state"`
	Reason      Reason    `json:"reason,omitempty"`
	Client      string    `json:"client"`
	Upstream    string    `json:"upstream"`
	Dial        string    `json:"dial"`
	Host        string    `json:"host"`
	URI         string    `json:"uri"`
	SNI         string    `json:"sni,omitempty"`
	Protocol    string    `json:"protocol"`
	Subprotocol string    `json:"subprotocol,omitempty"`
	OpenedAt    time.Time `json:"opened_at"` // while connecting: when it was admitted
	Age         float64   `json:"age"`
	Idle        float64   `json:"idle"`
	BytesIn     uint64    `json:"bytes_in"`
	BytesOut    uint64    `json:"bytes_out"`
	MessagesIn  uint64    `json:"messages_in"`
	MessagesOut uint64    `json:"messages_out"`
	Resumes     int       `json:"resumes"`
	Replayed    int       `json:"replayed"`
	Buffered    int64     `json:"buffered_bytes"`
}

// AgeDuration is Age.
func (v View) AgeDuration() time.Duration { return time.Duration(v.Age * float64(time.Second)) }

// View returns the connection as it is now.
func (c *Conn) View() View {
	c.reg.mu.Lock()
	defer c.reg.mu.Unlock()
	return c.view(time.Now())
}

// view is View with Registry.mu held.
func (c *Conn) view(now time.Time) View {
	v := View{
		ID: c.id, Kind: c.info.Kind, Route: c.route.key.name, State: c.state.String(), Reason: c.ending.Reason,
		Client: c.info.Client, Dial: c.dial, Host: c.info.Host, URI: c.info.URI, SNI: c.info.SNI,
		Protocol: c.info.Protocol, Subprotocol: c.subprotocol, OpenedAt: c.opened(),
		BytesIn: c.bytes[In].Load(), BytesOut: c.bytes[Out].Load(),
		MessagesIn: c.messages[In].Load(), MessagesOut: c.messages[Out].Load(),
		Upstream: UpstreamName(c.upstreamKey()), Resumes: c.resumes, Replayed: c.replayed, Buffered: c.buffered.Load(),
	}
	v.Age = now.Sub(v.OpenedAt).Seconds()
	v.Idle = max(0, now.Sub(c.accepted)-time.Duration(c.lastData.Load())).Seconds()
	return v
}

// opened is when the connection was opened, or admitted if it has not been.
func (c *Conn) opened() time.Time {
	if c.openedAt.IsZero() {
		return c.accepted
	}
	return c.openedAt
}

// Filter selects connections. The zero value selects all.
type Filter struct {
	Kind     Kind
	Route    string
	Upstream string
	State    *State
	Client   string
	MinAge   time.Duration
}

// List returns up to limit connections in order of age, the oldest first, that
// are younger than the one with the id after, and the id to go on after if there
// are more. A listing by pages shows each connection that lives through it once.
func (r *Registry) List(f Filter, limit int, after string) (page []View, next string) {
	now := time.Now()
	page = []View{}
	r.survey(&r.byAge, after, func(c *Conn) bool {
		switch {
		case !f.selects(c, now):
		case len(page) == limit:
			next = page[limit-1].ID
			return false
		default:
			page = append(page, c.view(now))
		}
		return true
	})
	return page, next
}

// selects reports whether f selects c. Registry.mu is held.
func (f Filter) selects(c *Conn, now time.Time) bool {
	return (f.Kind == "" || f.Kind == c.info.Kind) &&
		(f.Route == "" || f.Route == c.route.key.name) &&
		(f.Upstream == "" || f.Upstream == UpstreamName(c.upstreamKey())) &&
		(f.State == nil || *f.State == c.state) &&
		(f.Client == "" || f.Client == c.info.Client) &&
		(f.MinAge == 0 || now.Sub(c.opened()) >= f.MinAge)
}

// Stats are the registry's totals. All but ClosedByReason are of live connections.
type Stats struct {
	Total          int               `json:"total"`
	ByKind         map[Kind]int      `json:"by_kind"`
	ByRoute        map[string]int    `json:"by_route"`
	ByUpstream     map[string]int    `json:"by_upstream"`
	ByState        map[string]int    `json:"by_state"`
	ClosedByReason map[Reason]uint64 `json:"closed_by_reason"`
	AgeSeconds     Ages              `json:"age_seconds"`
}

// Ages counts connections by age: those not older than each bound in seconds,
// and "+Inf" for all.
type Ages struct {
	LE map[string]int `json:"le"`
}

// Stats returns the totals as they are now. Connections that come or go meanwhile
// may be counted or not, in all totals alike.
func (r *Registry) Stats() Stats {
	now := time.Now()
	s := Stats{
		ByKind: map[Kind]int{}, ByRoute: map[string]int{}, ByUpstream: map[string]int{},
		ByState: map[string]int{}, ClosedByReason: map[Reason]uint64{}, AgeSeconds: Ages{LE: map[string]int{}},
	}
	// By what is cheap to count by while others wait for the lock.
	routes, upstreams := make(map[*Route]int), make(map[*Upstream]int)
	states, younger := make([]int, stateCount), make([]int, len(ageBuckets))
	r.survey(&r.byAge, "", func(c *Conn) bool {
		s.Total++
		routes[c.route]++
		states[c.state]++
		if c.upstream != nil {
			upstreams[c.upstream]++
		}
		age := now.Sub(c.opened()).Seconds()
		for i := len(ageBuckets) - 1; i >= 0 && age <= ageBuckets[i]; i-- {
			younger[i]++
		}
		return true
	})
	for t, n := range routes {
		s.ByKind[t.key.kind] += n
		s.ByRoute[t.key.name] += n
	}
	for u, n := range upstreams {
		s.ByUpstream[u.Name()] += n
	}
	for state, n := range states {
		if n > 0 {
			s.ByState[State(state).String()] = n
		}
	}
	for i, bound := range ageBuckets {
		s.AgeSeconds.LE[strconv.FormatFloat(bound, 'f', -1, 64)] = younger[i]
	}
	s.AgeSeconds.LE["+Inf"] = s.Total
	r.mu.Lock()
	defer r.mu.Unlock()
	maps.Copy(s.ClosedByReason, r.closed)
	return s
}
