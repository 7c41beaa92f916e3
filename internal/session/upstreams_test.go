// This file is the route of a test: it gives out backends as a script says, and
// notes what it was asked for.

package session

import (
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
)

// firstUpstream is where every rig begins.
const firstUpstream = "app:80"

// outcome is how a dial ends.
type outcome uint8

const (
	accepts outcome = iota
	fails
	refuses // with a 4xx
	none    // there is no upstream
)

// dial is what an attempt meets.
type dial struct {
	is      outcome
	after   time.Duration
	manners manners
	early   func(p *peer) []byte
	// hurt is called with the backend before it is given out.
	hurt func(p *peer)
}

// searched is a search and its attempts.
type searched struct {
	Interruption
	at       time.Time
	attempts []attempted
}

type attempted struct {
	at       time.Time
	n        int
	upstream string
	found    *peer // nil: none
}

// testRoute is a route of named upstreams. Without a scripted dial the next
// attempt meets what otherwise says.
type testRoute struct {
	settings atomic.Pointer[Settings]

	reg    *registry.Route
	buffer int

	mu        sync.Mutex
	names     []string
	leaving   map[string]bool
	script    []dial
	otherwise dial
	searches  []*searched
	backends  []*peer // all that were made, the first one too
	near      []*memConn
	discarded []*peer
	warned    []string // upstreams that answer no pings
	lost      []string // upstreams whose backends went away
}

func newTestRoute(s Settings) *testRoute {
	r := &testRoute{names: []string{firstUpstream}, leaving: map[string]bool{}}
	r.settings.Store(&s)
	return r
}

func (r *testRoute) Settings() *Settings { return r.settings.Load() }

func (r *testRoute) Leaves(upstream string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.leaving[upstream]
}

func (r *testRoute) Others(upstream string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.ContainsFunc(r.names, func(name string) bool { return name != upstream && !r.leaving[name] })
}

func (r *testRoute) Unanswering(u *registry.Upstream) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.warned = append(r.warned, u.Name())
}

func (r *testRoute) Lost(u *registry.Upstream) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.lost = append(r.lost, u.Key())
}

// wantLost checks which upstreams were told of as having lost a backend.
func (r *rig) wantLost(upstreams ...string) {
	r.t.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	if !slices.Equal(r.lost, upstreams) {
		r.t.Errorf("got backends lost at %q, want %q", r.lost, upstreams)
	}
}

var errDial = errors.New("dialing: connection refused")

func (r *testRoute) Search(i Interruption) func(context.Context) (*Found, error) {
	s := &searched{Interruption: i, at: time.Now()}
	r.mu.Lock()
	r.searches = append(r.searches, s)
	r.mu.Unlock()
	tried := map[string]bool{}
	return func(ctx context.Context) (*Found, error) {
		r.mu.Lock()
		next := r.otherwise
		if len(r.script) > 0 {
			next, r.script = r.script[0], r.script[1:]
		}
		name := r.choose(i, tried)
		attempt := len(s.attempts) + 1
		s.attempts = append(s.attempts, attempted{at: time.Now(), n: attempt, upstream: name})
		index := len(s.attempts) - 1
		r.mu.Unlock()
		if name == "" || next.is == none {
			return nil, ErrNoUpstream
		}
		if next.after > 0 && !pause(ctx, next.after) {
			return nil, ctx.Err()
		}
		switch next.is {
		case fails:
			return nil, errDial
		case refuses:
			return nil, &RefusedError{Status: 403}
		default:
		}
		found, p := r.connect(name, i, attempt, next)
		r.mu.Lock()
		s.attempts[index].found = p
		r.mu.Unlock()
		return found, nil
	}
}

// choose picks an upstream that was not tried, the lost one last. r.mu is held.
func (r *testRoute) choose(i Interruption, tried map[string]bool) string {
	for range 2 {
		for _, name := range r.names {
			if name != i.Upstream && !r.leaving[name] && !tried[name] {
				tried[name] = true
				return name
			}
		}
		if i.Move {
			return ""
		}
		if !tried[i.Upstream] {
			tried[i.Upstream] = true
			return i.Upstream
		}
		clear(tried)
	}
	return ""
}

// connect makes a backend that has accepted.
func (r *testRoute) connect(name string, i Interruption, attempt int, with dial) (*Found, *peer) {
	near, far := newMemPipe(r.buffer)
	far.in.log = new([]byte)
	up := r.reg.Choose(func(func(string) registry.Load) string { return name })
	p := newPeer(far, false, with.manners)
	p.upstream, p.told, p.attempt = name, i, attempt
	var early []byte
	if with.early != nil {
		early = with.early(p)
	}
	if with.hurt != nil {
		with.hurt(p)
	}
	r.mu.Lock()
	r.backends = append(r.backends, p)
	r.near = append(r.near, near)
	r.mu.Unlock()
	discard := func() {
		_ = near.Close()
		r.reg.Leave(up)
		r.mu.Lock()
		r.discarded = append(r.discarded, p)
		r.mu.Unlock()
	}
	return &Found{Peer: Peer{Conn: near, Early: early}, Upstream: up, Dial: "dial of " + name, Discard: discard}, p
}

// then scripts what the next attempts meet.
func (r *testRoute) then(dials ...dial) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.script = append(r.script, dials...)
}

func (r *testRoute) always(d dial) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.otherwise = d
}

// latest is the backend that was made last.
func (r *testRoute) latest() *peer {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.backends[len(r.backends)-1]
}

// used are the backends that had the session, in order.
func (r *testRoute) used() (all []*peer) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, p := range r.backends {
		if !slices.Contains(r.discarded, p) {
			all = append(all, p)
		}
	}
	return all
}

// asked returns the searches so far.
func (r *testRoute) asked() []searched {
	r.mu.Lock()
	defer r.mu.Unlock()
	all := make([]searched, len(r.searches))
	for i, s := range r.searches {
		all[i] = *s
		all[i].attempts = slices.Clone(s.attempts)
	}
	return all
}

var _ Route = (*testRoute)(nil)
