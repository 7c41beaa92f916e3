// This file is what tests of reloads share: Caddy with both handlers, and what a reload
// must leave as it was.

package e2e

import (
	"fmt"
	"net/http"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"
)

// house is a running Caddy with both handlers, and what it counted at the last look.
type house struct {
	*proxy
	globals  string
	doors    []string // addresses for layer4 servers
	counters map[string]float64
}

// openHouse runs Caddy with a site of these routes and layer4 servers.
func openHouse(t testing.TB, globals, site string, tunnels ...string) *house {
	t.Helper()
	h := &house{globals: globals, counters: make(map[string]float64)}
	for range 4 {
		h.doors = append(h.doors, freeAddr(t))
	}
	configProbes.reset()
	passthroughs.mu.Lock()
	passthroughs.all = nil
	passthroughs.mu.Unlock()
	h.proxy = startCaddy(t, h.options(tunnels), h.site(site))
	return h
}

// config is a Caddyfile with a site of these routes, and the i-th layer4 server of
// tunnels at the i-th door; there is none for "".
func (h *house) config(site string, tunnels ...string) string {
	return h.siteConfig(h.options(tunnels), h.site(site))
}

func (h *house) site(routes string) string { return "config_probe\n" + routes + "\nrespond ok" }

func (h *house) options(tunnels []string) string {
	var servers strings.Builder
	for i, routes := range tunnels {
		if routes != "" {
			fmt.Fprintf(&servers, "%s {\n%s}\n", h.doors[i], strings.ReplaceAll(routes, "sni_passthrough", "sni_passthrough_probe"))
		}
	}
	globals := "metrics\n" + h.globals
	if servers.Len() > 0 {
		globals += "\nlayer4 {\n" + servers.String() + "}"
	}
	return globals
}

// change loads another config of these routes.
func (h *house) change(t testing.TB, site string, tunnels ...string) {
	t.Helper()
	h.reload(t, h.config(site, tunnels...))
}

// chat is a WebSocket route at a path. Settings follow the upstreams.
func chat(path, upstreams, settings string) string {
	return fmt.Sprintf("handle %s {\n websocket_proxy %s {\n %s\n }\n}\n", path, upstreams, settings)
}

// tunnel is a layer4 route.
func tunnel(upstreams, settings string) string {
	return toAll(upstreams + " {\n " + settings + "\n}")
}

// refused wants that a config is refused, and returns why.
func (h *house) refused(t testing.TB, config string) string {
	t.Helper()
	status, said := h.submit(t, "text/caddyfile", []byte(config))
	if status == http.StatusOK {
		t.Fatalf("a config was loaded that is to be refused:\n%s", config)
	}
	return said
}

// wantContinuous wants that no counter has fallen or gone since the last look, but those
// of routes that are gone, and that so many connections of each route were opened.
func (h *house) wantContinuous(t testing.TB, opened map[string]int, gone ...string) {
	t.Helper()
	now := make(map[string]float64)
	if !eventually(15*time.Second, func() bool {
		clear(now)
		for _, line := range grep(h.scrape(t), "caddy_connections_") {
			series, value, _ := strings.Cut(line, " ")
			var n float64
			if _, err := fmt.Sscan(value, &n); err != nil {
				t.Fatalf("%s: %v", line, err)
			}
			now[series] = n
		}
		return !slices.ContainsFunc(gone, func(name string) bool { return ofRoute(now, name) })
	}) {
		t.Errorf("series of routes %q, which are gone, are still there", gone)
	}
	for series, before := range h.counters {
		name, _, _ := strings.Cut(series, "{")
		counts := slices.ContainsFunc([]string{"_total", "_bucket", "_sum", "_count"}, func(end string) bool { return strings.HasSuffix(name, end) })
		after, there := now[series]
		ended := slices.ContainsFunc(gone, func(name string) bool { return strings.Contains(series, fmt.Sprintf("route=%q", name)) })
		if counts && !ended && (!there || after < before) {
			t.Errorf("%s: got %v (there: %v), want no less than before, %v", series, after, there, before)
		}
	}
	h.counters = now
	total := make(map[string]int)
	for series, n := range now {
		if name, labels, _ := strings.Cut(series, "{"); name == "caddy_connections_opened_total" {
			_, route, _ := strings.Cut(labels, `route="`)
			route, _, _ = strings.Cut(route, `"`)
			total[route] += int(n)
		}
	}
	if fmt.Sprint(total) != fmt.Sprint(opened) { // maps are printed in order
		t.Errorf("connections that were opened: got %v, want %v", total, opened)
	}
}

// ofRoute reports whether there are series of a route.
func ofRoute(series map[string]float64, name string) bool {
	for s := range series {
		if strings.Contains(s, fmt.Sprintf("route=%q", name)) {
			return true
		}
	}
	return false
}

// wantFreed wants that no config is in memory but the running one, which has so many
// sites, WebSocket routes and layer4 routes. Sites answer at their addresses.
func (h *house) wantFreed(t testing.TB, routes, tunnels int, sites ...string) {
	t.Helper()
	for _, site := range append(sites, h.addr) {
		got, c := knock(t, site, "/page") // now its handlers are known
		if got != http.StatusOK {
			t.Errorf("status of a page: got %d, want 200", got)
		}
		c.Close()
	}
	want := fmt.Sprintf("servers %d, tls apps %d, handlers %d, layer4 handlers %d", 1+len(sites), 1+len(sites), routes, tunnels)
	var got string
	if !eventually(20*time.Second, func() bool {
		runtime.GC()
		configProbes.mu.Lock()
		passthroughs.mu.Lock()
		got = fmt.Sprintf("servers %d, tls apps %d, handlers %d, layer4 handlers %d",
			count(configProbes.servers), count(configProbes.tls), count(configProbes.handler), count(passthroughs.all))
		passthroughs.mu.Unlock()
		configProbes.mu.Unlock()
		return got == want
	}) {
		t.Errorf("in memory: got %s, want those of the running config: %s", got, want)
	}
}

// echoes starts n backends of each handler.
func echoes(t testing.TB, n int) (webSockets, bytes []string) {
	t.Helper()
	for range n {
		webSockets, bytes = append(webSockets, rawBackend(t, echoRaw)), append(bytes, echoBackend(t, nil))
	}
	return webSockets, bytes
}
