// Package selection chooses upstreams by Caddy's own selection policies, the
// modules of the namespace http.reverse_proxy.selection_policies. A policy gets
// all upstreams of a pool in their order, so that indexes and weights stay, and
// sees of each how many connections Holdfast has there and whether it is available.
package selection

import (
	"encoding/json"
	"fmt"
	"math"
	"net/http"
	"slices"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
)

const namespace = "http.reverse_proxy.selection_policies"

// Upstream is an upstream as policies see it. It is made once and kept: policies
// may keep it, too, and know it again. What they see of it is set by Choose.
type Upstream struct {
	theirs *reverseproxy.Upstream
	state  state
}

// NewUpstream makes an upstream of which policies see that address; some hash it.
func NewUpstream(dial string) *Upstream {
	// The host is the upstream's own. Those that reverse_proxy shares by address
	// count its requests.
	u := &reverseproxy.Upstream{Dial: dial, Host: new(reverseproxy.Host)}
	return &Upstream{theirs: u, state: stateOf(u)}
}

// Candidate is an upstream that may be chosen if it is available, and the number
// of its connections.
type Candidate struct {
	*Upstream
	Conns     int
	Available bool
}

// Policy is a loaded selection policy.
type Policy struct {
	selector reverseproxy.Selector
	pool     reverseproxy.UpstreamPool // what the selector was last given

	blind  bool // the selector cannot be told of any state; see blind.go
	sample int  // if it is blind and counts, how many candidates it compares
}

// Load loads a policy, {"policy": "<name>", …}; without one, least_conn.
func Load(ctx caddy.Context, raw json.RawMessage) (*Policy, error) {
	return load(ctx, raw, !CanShowState())
}

func load(ctx caddy.Context, raw json.RawMessage, blind bool) (*Policy, error) {
	if len(raw) == 0 {
		raw = json.RawMessage(`{"policy":"least_conn"}`)
	}
	var named struct {
		Policy string `json:"policy"`
	}
	if err := json.Unmarshal(raw, &named); err != nil {
		return nil, fmt.Errorf("reading lb_policy: %w", err)
	}
	if _, err := caddy.GetModule(namespace + "." + named.Policy); err != nil {
		return nil, errUnknown(named.Policy)
	}
	if err := checkFallbacks(raw, true); err != nil {
		return nil, err
	}
	holder := struct {
		Raw json.RawMessage `caddy:"namespace=http.reverse_proxy.selection_policies inline_key=policy"`
	}{raw}
	mod, err := ctx.LoadModule(&holder, "Raw")
	if err != nil {
		return nil, fmt.Errorf("loading lb_policy %q: %w", named.Policy, err)
	}
	selector, ok := mod.(reverseproxy.Selector)
	if !ok {
		return nil, fmt.Errorf("lb_policy %q selects no upstreams: it is a %T", named.Policy, mod)
	}
	p := &Policy{selector: selector, blind: blind}
	switch s := selector.(type) {
	case *reverseproxy.LeastConnSelection:
		p.sample = math.MaxInt
	case *reverseproxy.RandomChoiceSelection:
		p.sample = s.Choose
	}
	return p, nil
}

// Choose returns the index of the candidate that the policy chooses, or -1. The
// header is what the policy tells the client (Set-Cookie), nil if nothing; it is
// for an answer of the chosen upstream only.
//
// Neither a policy nor an upstream is for two calls at once: the caller, whose
// lock guards the counts, holds it. Choose does not block. A candidate must not
// be there twice. What policies need of r is said at Prepare.
func (p *Policy) Choose(candidates []Candidate, r *http.Request) (index int, header http.Header) {
	if p.blind && p.sample > 0 {
		return fewest(candidates, p.sample), nil
	}
	pool := p.show(candidates)
	if len(pool) == 0 {
		return -1, nil
	}
	w := new(recorder)
	chosen := p.selector.Select(pool, r, w)
	// Not looked up in the pool, which a policy may have sorted.
	index = slices.IndexFunc(candidates, func(c Candidate) bool { return c.theirs == chosen })
	if index < 0 || !candidates[index].Available {
		return -1, nil
	}
	if len(w.header) == 0 {
		return index, nil
	}
	return index, w.header
}

// show sets what the policy sees of the candidates and returns what it is given.
// That is the same slice as long as the upstreams are the same: a policy may keep
// it, to know whether they are.
func (p *Policy) show(candidates []Candidate) reverseproxy.UpstreamPool {
	if p.blind {
		return available(candidates)
	}
	same := len(p.pool) == len(candidates)
	for i, c := range candidates {
		c.state.set(c.Conns, c.Available)
		same = same && p.pool[i] == c.theirs
	}
	if !same {
		p.pool = make(reverseproxy.UpstreamPool, len(candidates))
		for i, c := range candidates {
			p.pool[i] = c.theirs
		}
	}
	return p.pool
}

// checkFallbacks refuses a cookie policy below a query or header policy. Those
// give their fallback no response, and setting the cookie there would panic.
func checkFallbacks(raw json.RawMessage, response bool) error {
	var p struct {
		Policy   string          `json:"policy"`
		Fallback json.RawMessage `json:"fallback"`
	}
	if err := json.Unmarshal(raw, &p); err != nil {
		return fmt.Errorf("reading the fallback of lb_policy: %w", err)
	}
	switch p.Policy {
	case "cookie":
		if !response {
			return fmt.Errorf("lb_policy: %q cannot be a fallback of query or header: they let it set no cookie", p.Policy)
		}
	case "query", "header":
		response = false
	default: // what others call fallback is their own business
		return nil
	}
	if len(p.Fallback) == 0 {
		return nil
	}
	return checkFallbacks(p.Fallback, response)
}

// errUnknown is the error for a name that no module has.
func errUnknown(name string) error {
	modules := caddy.GetModules(namespace)
	names := make([]string, len(modules))
	for i, m := range modules {
		names[i] = m.ID.Name()
	}
	return fmt.Errorf("unknown lb_policy %q: want one of %s", name, strings.Join(names, ", "))
}

// recorder is a response of which only the header is kept.
type recorder struct{ header http.Header }

func (r *recorder) Header() http.Header {
	if r.header == nil {
		r.header = make(http.Header)
	}
	return r.header
}

func (*recorder) Write(b []byte) (int, error) { return len(b), nil }

func (*recorder) WriteHeader(int) {}

// Interface guards
var _ http.ResponseWriter = (*recorder)(nil)
