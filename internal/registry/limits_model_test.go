// This file holds the limits against a list of connections that is counted anew at
// every step, and admits at the same time. HOLDFAST_SEED repeats one run.

package registry

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
)

func TestRandomLimits(t *testing.T) {
	first, n := rand.Uint64N(1<<32), uint64(100)
	if s := os.Getenv("HOLDFAST_SEED"); s != "" {
		var err error
		if first, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatalf("HOLDFAST_SEED: %v", err)
		}
		n = 1
	}
	outcomes := map[string]int{}
	for seed := first; seed < first+n && !t.Failed(); seed++ {
		limitAtRandom(t, seed, outcomes)
	}
	t.Logf("outcomes: %v", outcomes)
	for _, o := range []string{"told of pressure", "cut", "closed by pressure"} {
		if n > 1 && outcomes[o] == 0 {
			t.Errorf("got outcomes %v, want some %s: the test is void", outcomes, o)
		}
	}
	if n > 1 && len(outcomes) < 9 {
		t.Errorf("got outcomes %v, want the four limits, a route gone and admission: the test is void", outcomes)
	}
}

// counted is a connection as the reference knows it.
type counted struct {
	route  string
	client string
	rec    *Conn
	life   *life
}

// reference is what limits say, by counting all connections at every question.
type reference struct {
	all     Limits
	prefix  int
	routes  map[string]*Route // those a config declares
	own     map[string]Limits
	conns   []counted
	refused map[string]float64 // as in refused_total
	pressed
}

var limitedClients = []string{
	"192.0.2.1", "::ffff:192.0.2.1", "192.0.2.2", "2001:db8::1", "2001:db8::2", "2001:db8:0:1::1",
	"2001:db8:0:100::1", "fe80::1%eth0", "fe80::1%eth1", "", "@",
}

func limitAtRandom(t *testing.T, seed uint64, outcomes map[string]int) {
	t.Helper()
	rng := rand.New(rand.NewPCG(seed, 9))
	names := []string{"a", "b", "c"}
	r := New()
	ref := &reference{prefix: 64, routes: map[string]*Route{}, own: map[string]Limits{}, refused: map[string]float64{}}
	last := map[string]*Route{} // also those that are gone
	for step := range 300 {
		name := names[rng.IntN(len(names))]
		switch rng.IntN(22) {
		default:
			route, info := last[name], Info{Kind: WebSocket, Client: limitedClients[rng.IntN(len(limitedClients))]}
			if route == nil {
				continue
			}
			want := ref.refusal(name, info.Client)
			if want == "admitted" || strings.HasPrefix(want, "max_connections of the registry") { // else it needs no room
				ref.arrives(name)
			}
			l := new(life)
			c, err := r.Admit(route, info, &l.owner)
			if got := outcome(err); got != want {
				t.Fatalf("HOLDFAST_SEED=%d, step %d, %q at %s: got %q, want %q", seed, step, info.Client, name, got, want)
			}
			if err == nil {
				ref.conns = append(ref.conns, counted{name, info.Client, c, l})
			} else if ref.knows(name) {
				reason := "route_gone"
				if limit, ok := errors.AsType[*LimitError](err); ok {
					reason = limit.Reason
				}
				ref.refused[reason+" "+name]++
			}
			short, _, _ := strings.Cut(want, ":")
			outcomes[short]++
		case 0, 1, 2, 3:
			if len(ref.conns) > 0 {
				i := rng.IntN(len(ref.conns))
				ref.leaves(ref.conns[i].life)
				finish(ref.conns[i].rec, Idle)
				ref.conns = append(ref.conns[:i], ref.conns[i+1:]...)
			}
		case 4:
			ref.all, ref.prefix = Limits{randomLimit(rng, 12), randomLimit(rng, 4)}, []int{48, 56, 64, 128}[rng.IntN(4)]
			r.SetLimits(ref.all, ref.prefix)
		case 5, 6:
			if route := ref.routes[name]; route != nil {
				ref.own[name] = Limits{randomLimit(rng, 6), randomLimit(rng, 3)}
				route.SetLimits(ref.own[name])
			}
		case 7:
			if route := ref.routes[name]; route == nil {
				ref.routes[name] = r.Retain(WebSocket, name)
				last[name] = ref.routes[name]
			} else if rng.IntN(4) == 0 {
				r.Release(route)
				delete(ref.routes, name)
			}
		case 8, 9, 10, 11:
			if len(ref.conns) > 0 {
				ref.goesOn(rng, ref.conns[rng.IntN(len(ref.conns))])
			}
		case 12:
			ref.percent = []int{0, 1, 3, 50, 80, 90, 100}[rng.IntN(7)]
			r.SetWatch(Watch{Pressure: ref.percent, Notices: &ref.noticed})
		}
		ref.forget(names)
		ref.comparePressure(t, fmt.Sprintf("HOLDFAST_SEED=%d, step %d", seed, step))
		ref.compare(t, r, last, fmt.Sprintf("HOLDFAST_SEED=%d, step %d", seed, step))
	}
	got := gathered(t, r)
	for key, want := range ref.refused {
		if v := got["refused_total websocket "+key]; v != want {
			t.Fatalf("HOLDFAST_SEED=%d: %s: got %v refused, want %v", seed, key, v, want)
		}
	}
	for _, c := range ref.conns {
		finish(c.rec, Idle)
	}
	wantNothingCounted(t, r)
	if r.sweeper != nil {
		r.sweeper.Stop()
	}
	outcomes["told of pressure"] += ref.told
	outcomes["cut"] += ref.cuts
	outcomes["closed by pressure"] += ref.closed
}

func randomLimit(rng *rand.Rand, upTo int) *int {
	switch rng.IntN(4) {
	case 0:
		return nil
	case 1:
		return new(0)
	default:
		return new(1 + rng.IntN(upTo))
	}
}

// outcome is what Admit has said, in short.
func outcome(err error) string {
	if err != nil {
		return err.Error()
	}
	return "admitted"
}

// knows reports whether there is anything of a route.
func (ref *reference) knows(name string) bool {
	return ref.routes[name] != nil || ref.total(func(c counted) bool { return c.route == name }) > 0
}

// forget drops what was said of routes that are gone: they begin anew.
func (ref *reference) forget(names []string) {
	for _, name := range names {
		if !ref.knows(name) {
			delete(ref.own, name)
			maps.DeleteFunc(ref.refused, func(key string, _ float64) bool { return strings.HasSuffix(key, " "+name) })
		}
	}
}

func (ref *reference) total(is func(counted) bool) (n int) {
	for _, c := range ref.conns {
		if is(c) {
			n++
		}
	}
	return n
}

// refusal is what Admit has to say.
func (ref *reference) refusal(route, client string) string {
	if ref.routes[route] == nil {
		return ErrRouteGone.Error()
	}
	own, ip := ref.own[route], ref.ip(client)
	here := func(c counted) bool { return c.route == route }
	sameIP := func(c counted) bool { return ip != "" && ref.ip(c.client) == ip }
	bound := func(c counted) bool { return !isOff(ref.own[c.route].Connections) }
	boundPerIP := func(c counted) bool { return !isOff(ref.own[c.route].PerIP) }
	for _, q := range []struct {
		limit  *int
		counts func(counted) bool
		name   string
		holds  bool
	}{
		{own.PerIP, func(c counted) bool { return here(c) && sameIP(c) }, "max_connections_per_ip of the route", ip != ""},
		{ref.all.PerIP, func(c counted) bool { return boundPerIP(c) && sameIP(c) }, "max_connections_per_ip of the registry", ip != "" && !isOff(own.PerIP)},
		{own.Connections, here, "max_connections of the route", true},
		{ref.all.Connections, bound, "max_connections of the registry", !isOff(own.Connections)},
	} {
		if q.holds && q.limit != nil && *q.limit > 0 && ref.total(q.counts) >= *q.limit {
			return fmt.Sprintf("%s is reached: %d", q.name, *q.limit)
		}
	}
	return "admitted"
}

func isOff(n *int) bool { return n != nil && *n == 0 }

// ip is how the client is known, found by other means than the registry's; "" for
// one without an IP.
func (ref *reference) ip(client string) string {
	address, _, _ := strings.Cut(client, "%")
	ip := net.ParseIP(address)
	switch {
	case ip == nil:
		return ""
	case ip.To4() != nil:
		return ip.String()
	}
	return ip.Mask(net.CIDRMask(ref.prefix, 128)).String()
}

// compare holds all that the registry has counted against the list.
func (ref *reference) compare(t *testing.T, r *Registry, routes map[string]*Route, at string) {
	t.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	if want := ref.total(func(c counted) bool { return !isOff(ref.own[c.route].Connections) }); r.counted != want {
		t.Fatalf("%s: got %d connections counted in the registry, want %d", at, r.counted, want)
	}
	ref.compareByIP(t, &r.limits, at+", registry", ref.all.PerIP, func(c counted) bool { return !isOff(ref.own[c.route].PerIP) })
	for name, route := range routes {
		if !ref.knows(name) {
			continue
		}
		here := func(c counted) bool { return c.route == name }
		if want := ref.total(here); route.conns != want {
			t.Fatalf("%s: got %d connections counted at %s, want %d", at, route.conns, name, want)
		}
		ref.compareByIP(t, &route.limits, at+", route "+name, ref.own[name].PerIP, here)
	}
}

func (ref *reference) compareByIP(t *testing.T, q *limits, at string, limit *int, counts func(counted) bool) {
	t.Helper()
	want, got := map[string]int{}, map[string]int{}
	for _, c := range ref.conns {
		if ip := ref.ip(c.client); limit != nil && *limit > 0 && counts(c) && ip != "" {
			want[ip]++
		}
	}
	for ip, n := range q.byIP {
		got[ip.String()] = n
	}
	if !maps.Equal(got, want) {
		t.Fatalf("%s: got %v by IP, want %v", at, got, want)
	}
}

// Connections that arrive at once never exceed a limit, and fill it.
func TestLimitsHoldForABurst(t *testing.T) {
	const burst = 1000
	for name, tt := range map[string]struct {
		all, own Limits
		want     int
	}{
		"the registry's":        {Limits{Connections: new(100)}, Limits{}, 100},
		"the routes'":           {Limits{}, Limits{Connections: new(30)}, 60},
		"the registry's per IP": {Limits{PerIP: new(7)}, Limits{}, 70},
		"the routes' per IP":    {Limits{}, Limits{PerIP: new(3)}, 60},
		"all":                   {Limits{Connections: new(50), PerIP: new(6)}, Limits{Connections: new(40), PerIP: new(5)}, 50},
	} {
		t.Run(name, func(t *testing.T) {
			r := New()
			routes := []*Route{r.Retain(WebSocket, "a"), r.Retain(WebSocket, "b")}
			r.SetLimits(tt.all, 0)
			for _, route := range routes {
				route.SetLimits(tt.own)
			}
			for range 3 {
				var live, refused atomic.Int64
				start, end := make(chan struct{}), make(chan struct{})
				var tried, done sync.WaitGroup
				tried.Add(burst)
				for i := range burst {
					done.Go(func() {
						<-start
						// Each route gets each of ten clients equally often.
						c, err := r.Admit(routes[i%2], Info{Client: netip.AddrFrom4([4]byte{192, 0, 2, byte(i / 2 % 10)}).String()}, new(owner))
						if err != nil {
							refused.Add(1)
							tried.Done()
							return
						}
						if n := live.Add(1); n > int64(tt.want) {
							t.Errorf("got %d connections, want at most %d", n, tt.want)
						}
						tried.Done()
						<-end
						finish(c, Idle)
					})
				}
				close(start)
				tried.Wait()
				if n := int(live.Load()); n != tt.want || n != r.Len() || int(refused.Load()) != burst-tt.want {
					t.Errorf("got %d admitted, %d live, %d refused, want exactly %d of %d", n, r.Len(), refused.Load(), tt.want, burst)
				}
				close(end)
				done.Wait()
				wantNothingCounted(t, r)
			}
		})
	}
}

// Connections come and go while limits change: no limit that holds throughout is
// exceeded, and no place is lost.
func TestLimitsHoldWhileTheyChange(t *testing.T) {
	const most, mostPerIP = 40, 6
	r := New()
	routes := []*Route{r.Retain(WebSocket, "a"), r.Retain(WebSocket, "b")}
	r.SetLimits(Limits{new(most), new(mostPerIP)}, 0)
	var live atomic.Int64
	var perIP [10]atomic.Int64
	var all sync.WaitGroup
	for i := range 1000 {
		all.Go(func() {
			ip := i % len(perIP)
			for range 5 {
				c, err := r.Admit(routes[i%2], Info{Client: netip.AddrFrom4([4]byte{192, 0, 2, byte(ip)}).String()}, new(owner))
				if err != nil {
					continue
				}
				if n, m := live.Add(1), perIP[ip].Add(1); n > most || m > mostPerIP {
					t.Errorf("got %d connections, %d of one client, want at most %d and %d", n, m, most, mostPerIP)
				}
				c.Open("")
				live.Add(-1)
				perIP[ip].Add(-1)
				finish(c, Idle)
			}
		})
	}
	all.Go(func() {
		for i := range 300 {
			r.SetLimits(Limits{new(most - i%3), new(mostPerIP - i%2)}, 48+i%16)
			routes[i%2].SetLimits(Limits{PerIP: []*int{nil, new(3)}[i/2%2]})
		}
	})
	all.Wait()
	wantNothingCounted(t, r)
}
