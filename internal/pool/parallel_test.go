// This file tests that everything may happen at once.

package pool

import (
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"

	"github.com/holdfast-proxy/caddy-holdfast/internal/health"
	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
)

// Configs come and go, upstreams come, go, fail and are drained, while connections
// are opened, resumed, moved and ended: no limit is exceeded, nothing hangs, and in
// the end nothing is left.
func TestAllAtOnce(t *testing.T) {
	for seed := range uint64(3) {
		synctest.Test(t, func(t *testing.T) { newTurmoil(t, seed).run() })
	}
}

const turmoilLimit = 3 // connections of each upstream

// turmoil is a route whose config is reloaded all the time.
type turmoil struct {
	*testing.T
	seed    uint64
	reg     *registry.Registry
	route   *registry.Route
	net     *network
	source  *source
	config  Config
	current atomic.Pointer[Pool]
	made    atomic.Int32
}

func newTurmoil(t *testing.T, seed uint64) *turmoil {
	reg := registry.New()
	m := &turmoil{
		T: t, seed: seed, reg: reg, route: reg.Retain(registry.WebSocket, "route"),
		net: new(network), source: &source{names: []string{"a:80", "b:80"}},
	}
	m.config = Config{
		Upstreams: []Address{mustParse(t, "d:80"), mustParse(t, "{tenant}:80")},
		Dynamic:   m.source, Policy: load(t, `{"policy":"least_conn"}`), Connect: m.net.connect, Logger: zap.NewNop(),
		MaxConnections: turmoilLimit, MaxFails: 3, FailDuration: 20 * time.Millisecond, LeaveUnhealthy: true,
		TryDuration: 20 * time.Millisecond, TryInterval: 5 * time.Millisecond,
		Checks: &Checks{Checkers: health.NewCheckers(), Key: "check", Probe: m.net.probe, Spec: health.Spec{
			Interval: 10 * time.Millisecond, Timeout: time.Second, Fails: 1, Passes: 1, Logger: zap.NewNop(),
		}},
		Changed: func(string, bool) { m.current.Load().Upstreams() },
		Left:    func(route *registry.Route) { m.current.Load().Leaves(route, "a:80") },
	}
	m.current.Store(New(m.config))
	m.current.Load().Start(m.route)
	return m
}

// names are of the upstreams that may be there.
var names = []string{"a:80", "b:80", "c:80", "d:80", "{tenant}:80", "not/good"}

func (m *turmoil) run() {
	var all sync.WaitGroup
	for i, do := range []func(*rand.Rand){
		m.reload, m.change, m.ask, m.ask, m.live, m.live, m.live, m.live, m.live, m.live,
	} {
		rng := rand.New(rand.NewPCG(m.seed, uint64(i)))
		all.Go(func() {
			for range 300 {
				do(rng)
				<-time.After(time.Duration(rng.IntN(4)) * time.Millisecond)
			}
		})
	}
	all.Wait()
	m.current.Load().Stop()
	for _, name := range names {
		m.reg.Drain(name, "", false)
	}
	synctest.Wait()
	for _, u := range m.reg.Upstreams() {
		m.Errorf("seed %d: got %+v left, want nothing", m.seed, u)
	}
	if m.made.Load() == 0 {
		m.Errorf("seed %d: got no connection", m.seed)
	}
}

// reload replaces the config. Handlers of the old one may still be at work, and the
// new one is asked before it has started.
func (m *turmoil) reload(*rand.Rand) {
	next := New(m.config)
	old := m.current.Swap(next)
	next.Start(m.route)
	old.Stop()
	old.Stop()
}

// change changes what is outside.
func (m *turmoil) change(rng *rand.Rand) {
	name := names[rng.IntN(len(names))]
	m.net.set(name, rng.IntN(2) == 0)
	m.net.dialed()
	m.reg.Drain(name, "", rng.IntN(4) == 0)
	switch rng.IntN(6) {
	case 0:
		m.source.breaks(errNoAnswer)
	case 1:
		m.source.hangs(rng.IntN(2) == 0)
	default:
		from := rng.IntN(len(names))
		m.source.says(names[from : from+rng.IntN(len(names)-from+1)]...)
	}
}

// ask asks all that may be asked.
func (m *turmoil) ask(rng *rand.Rand) {
	p, name := m.current.Load(), names[rng.IntN(len(names))]
	p.Has(name)
	p.Leaves(m.route, name)
	p.Others(m.route, name)
	p.kick()
	m.reg.Upstreams()
	p.Upstreams()
}

// live opens, resumes or moves a connection, which then stays for a while.
func (m *turmoil) live(rng *rand.Rand) {
	c := client()
	c.Replace = func(string) string { return fmt.Sprintf("t%d:80", rng.IntN(3)) }
	p := m.current.Load()
	target := p.Tries(m.route, c, Why(rng.IntN(3)), names[rng.IntN(len(names))]).Next(m.Context())
	if target == nil {
		return
	}
	defer m.route.Leave(target.Place)
	m.made.Add(1)
	_, err := target.Dial(m.Context())
	p.Tried(m.route, target, 0, err)
	m.route.Loads(func(load func(string) registry.Load) {
		if n := load(target.Place.Key()).Conns; n > turmoilLimit {
			m.Errorf("seed %d: %s: got %d connections, want at most %d", m.seed, target.Place.Key(), n, turmoilLimit)
		}
	})
	<-time.After(time.Duration(rng.IntN(20)) * time.Millisecond)
}
