// This file shows upstreams: what the configs say of them and what the registry
// knows, in the admin API and as metrics.

package registry

import (
	"cmp"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// UpstreamState is what a config says of an upstream.
type UpstreamState struct {
	Key      string
	Dial     string // the address; "" if placeholders make it
	Healthy  bool   // as the active health checks say
	MaxFails int    // so many recent failures make it unhealthy as well; 0: none do
}

// Pool is what Route.Settings may implement to say which upstreams there are.
type Pool interface{ Upstreams() []UpstreamState }

// UpstreamView is an upstream as the admin API shows it.
type UpstreamView struct {
	Route       string `json:"route"`
	Upstream    string `json:"upstream"`
	Dial        string `json:"dial"`
	Healthy     bool   `json:"healthy"`
	Draining    bool   `json:"draining"`
	Connections int    `json:"connections"`
	Fails       int    `json:"fails"`

	declared bool
}

// Upstreams returns the upstreams of all routes: those that the newest config has,
// in its order, and those that connections still use.
func (r *Registry) Upstreams() []UpstreamView {
	routes := r.allRoutes()
	views := make([]UpstreamView, 0, len(routes))
	for _, t := range routes {
		var states []UpstreamState
		if p, ok := t.Settings.Load().(Pool); ok {
			states = p.Upstreams() // before the lock: it has locks of its own
		}
		views = append(views, t.views(states)...)
	}
	return views
}

func (r *Registry) allRoutes() []*Route {
	r.mu.Lock()
	defer r.mu.Unlock()
	routes := make([]*Route, 0, len(r.routes))
	for _, t := range r.routes {
		routes = append(routes, t)
	}
	slices.SortFunc(routes, func(a, b *Route) int {
		return cmp.Or(cmp.Compare(a.key.name, b.key.name), cmp.Compare(a.key.kind, b.key.kind))
	})
	return routes
}

func (t *Route) views(states []UpstreamState) (views []UpstreamView) {
	t.reg.mu.Lock()
	defer t.reg.mu.Unlock()
	load := t.load(time.Now())
	shown := make(map[string]bool, len(states))
	for _, s := range states {
		l := load(s.Key)
		shown[s.Key] = true
		views = append(views, UpstreamView{
			Route: t.key.name, Upstream: UpstreamName(s.Key), Dial: s.Dial, declared: true,
			Healthy:  s.Healthy && (s.MaxFails == 0 || l.Fails < s.MaxFails),
			Draining: l.Draining, Connections: l.Conns, Fails: l.Fails,
		})
	}
	rest := len(views)
	for key := range t.upstreams {
		if shown[key] {
			continue
		}
		l := load(key)
		name, address, _ := strings.Cut(key, " ")
		views = append(views, UpstreamView{
			Route: t.key.name, Upstream: name, Dial: cmp.Or(address, name), Healthy: true,
			Draining: l.Draining, Connections: l.Conns, Fails: l.Fails,
		})
	}
	slices.SortFunc(views[rest:], func(a, b UpstreamView) int {
		return cmp.Or(cmp.Compare(a.Upstream, b.Upstream), cmp.Compare(a.Dial, b.Dial))
	})
	return views
}

// upstreamCollector makes the metrics of upstreams when they are asked for: which
// upstreams there are is up to configs and dynamic sources.
type upstreamCollector struct{ reg *Registry }

var (
	upstreamLabels      = []string{"route", "upstream"}
	upstreamConnections = prometheus.NewDesc(
		prometheus.BuildFQName(namespace, subsystem, "upstream_connections"),
		"Connections that use an upstream.", upstreamLabels, nil)
	upstreamHealthy = prometheus.NewDesc(
		prometheus.BuildFQName(namespace, subsystem, "upstream_healthy"),
		"Whether an upstream of the config is healthy, as its checks and recent failures say.", upstreamLabels, nil)
)

// Describe implements prometheus.Collector.
func (*upstreamCollector) Describe(descs chan<- *prometheus.Desc) {
	descs <- upstreamConnections
	descs <- upstreamHealthy
}

// Collect implements prometheus.Collector. The addresses that placeholders made
// count together, under the upstream's name.
func (c *upstreamCollector) Collect(metrics chan<- prometheus.Metric) {
	type labels struct{ route, upstream string }
	conns, healthy := make(map[labels]int), make(map[labels]bool)
	for _, v := range c.reg.Upstreams() {
		l := labels{v.Route, v.Upstream}
		conns[l] += v.Connections
		if v.declared {
			before, known := healthy[l]
			healthy[l] = v.Healthy && (before || !known)
		}
	}
	gauge := func(desc *prometheus.Desc, value float64, l labels) {
		metrics <- prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, value, l.route, l.upstream)
	}
	for l, n := range conns {
		gauge(upstreamConnections, float64(n), l)
	}
	for l, is := range healthy {
		value := 0.0
		if is {
			value = 1
		}
		gauge(upstreamHealthy, value, l)
	}
}
