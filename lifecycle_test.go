package holdfast

import (
	"testing"
	"time"

	"go.uber.org/zap"

	"github.com/holdfast-proxy/caddy-holdfast/internal/pool"
	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
)

// While two configs serve, live connections follow the older one, and nobody leaves an
// upstream for being in one of them only. When one stops, the other one counts alone,
// whichever that is.
func TestTwoGenerations(t *testing.T) {
	l := &lifecycle{registry: registry.New()}
	old, failing, fresh := newRouteStub("old"), newRouteStub("failing"), newRouteStub("fresh")
	running, failed, next := generationOf(old), generationOf(failing), generationOf(fresh)
	var route *registry.Route
	check := func(what string, inForce *routeStub, alone bool) {
		t.Helper()
		if got := route.Settings.Load(); got != any(inForce) {
			t.Errorf("%s: got settings %s, want %s", what, got.(*routeStub).json, inForce.json)
		}
		if got := inForce.alone.Load(); got != alone {
			t.Errorf("%s: the config in force is alone: got %v, want %v", what, got, alone)
		}
	}
	l.start(running)
	route = l.route(running, registry.WebSocket, "app")
	check("the first one has started", old, true)

	// A request may come before all apps have started.
	if got := l.route(failed, registry.WebSocket, "app"); got != route {
		t.Fatalf("route of the next config: got %p, want the same, %p", got, route)
	}
	check("the next one has a request", old, false)
	l.start(failed)
	check("it has started", old, false)
	l.stop(failed)
	check("it was rolled back", old, true)

	l.start(next)
	check("another one has started", old, false)
	l.stop(running)
	check("the first one has stopped", fresh, true)
	if failing.left > 0 || old.left == 0 || fresh.left == 0 {
		t.Errorf("upstreams were left by: old %d, failing %d, fresh %d; want never by the one that failed", old.left, failing.left, fresh.left)
	}
}

// A reload may have many connections to tell: new ones do not wait for that.
func TestRoutesAreFoundDuringAReload(t *testing.T) {
	l := &lifecycle{registry: registry.New()}
	g := generationOf(newRouteStub("running"))
	l.start(g)
	l.mu.Lock()
	defer l.mu.Unlock()
	found := make(chan *registry.Route, 1) // nobody may be left to take it
	go func() { found <- l.route(g, registry.WebSocket, "app") }()
	select {
	case route := <-found:
		if route == nil {
			t.Error("got no route, want it")
		}
	case <-time.After(10 * time.Second):
		t.Error("got no answer while the generations are being changed, want the route")
	}
}

// routeStub is what a config says about a route, and how often it had upstreams left
// that only other configs have.
type routeStub struct {
	routeCommon
	left int
}

func newRouteStub(settings string) *routeStub {
	return &routeStub{routeCommon: routeCommon{kind: registry.WebSocket, json: settings, pool: pool.New(pool.Config{})}}
}

func (s *routeStub) leave(*registry.Route) int {
	if s.alone.Load() {
		s.left++
	}
	return 0
}

func (s *routeStub) stays(string) bool { return true }

func generationOf(s *routeStub) *generation {
	return &generation{routes: map[string]*declaration{"app": {config: s}}, logger: zap.NewNop()}
}
