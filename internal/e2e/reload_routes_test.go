// This file reloads configs whose routes come, go, move and are renamed, under live
// connections of both handlers.

package e2e

import (
	"fmt"
	"maps"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"
)

// Connections of routes that are gone live on for orphan_timeout, over which they are
// closed, unless the routes come back. Others are not concerned.
func TestReloadRemovesRoutes(t *testing.T) {
	const soon, late = "connection_registry {\n orphan_timeout 600ms\n}", "connection_registry {\n orphan_timeout 1h\n}"
	w, b := echoes(t, 1)
	site := func(name string) string { return chat("/"+name, w[0], "name "+name) }
	h := openHouse(t, late, site("stays")+site("goes"), tunnel(b[0], "name stays-too"), tunnel(b[0], "name goes-too"))
	stay := h.join(t, 5, "/stays", h.doors[0])
	goers := h.join(t, 8, "/goes", h.doors[1])
	opened := map[string]int{"stays": 5, "goes": 8, "stays-too": 5, "goes-too": 8}
	h.wantContinuous(t, opened)

	h.change(t, site("stays"), tunnel(b[0], "name stays-too"))
	wantChatting(t, append(stay, goers...)...)
	h.wantContinuous(t, opened)
	h.change(t, site("stays")+site("goes"), tunnel(b[0], "name stays-too"), tunnel(b[0], "name goes-too"))
	goers = append(goers, h.join(t, 1, "/goes", h.doors[1])...)
	opened["goes"], opened["goes-too"] = 9, 9
	h.globals = soon
	h.change(t, site("stays")+site("goes"), tunnel(b[0], "name stays-too"), tunnel(b[0], "name goes-too"))
	wantChatting(t, append(stay, goers...)...)
	h.wantContinuous(t, opened)

	began := time.Now()
	h.change(t, site("stays"), tunnel(b[0], "name stays-too"))
	wantOut(t, began, 600*time.Millisecond, goers...)
	if got, _ := knock(t, h.addr, "/goes"); got != http.StatusOK {
		t.Errorf("a new client of a route that is gone: got status %d, want the 200 of what is there now", got)
	}
	if c, err := net.Dial("tcp", h.doors[1]); err == nil {
		c.Close()
		t.Error("a new client of a server that is gone: it is let in")
	}
	wantChatting(t, stay...)
	h.wantContinuous(t, map[string]int{"stays": 5, "stays-too": 5}, "goes", "goes-too")
	h.wantFreed(t, 1, 1)
	finish(t, stay...)
}

// A route with another name is another route: the old one is gone, though it has the
// same upstreams.
func TestReloadRenamesRoutes(t *testing.T) {
	w, b := echoes(t, 1)
	h := openHouse(t, "connection_registry {\n orphan_timeout 300ms\n}", chat("/", w[0], ""), tunnel(b[0], ""))
	old := h.join(t, 6, "/", h.doors[0])
	names := map[string]int{"http://" + h.addr + "#1": 6, h.doors[0] + "#1": 6}
	h.wantContinuous(t, names)
	before := h.stats(t).ClosedByReason["orphan"]
	began := time.Now()
	h.change(t, chat("/", w[0], "name app"), tunnel(b[0], "name tunnels"))
	fresh := h.join(t, 3, "/", h.doors[0])
	wantOut(t, began, 300*time.Millisecond, old...)
	h.waitReason(t, "orphan", before, len(old))
	wantChatting(t, fresh...)
	var gone []string
	for name := range names {
		gone = append(gone, name)
	}
	h.wantContinuous(t, map[string]int{"app": 3, "tunnels": 3}, gone...)
	if got := h.stats(t).ByRoute; !maps.Equal(got, map[string]int{"app": 3, "tunnels": 3}) {
		t.Errorf("routes: got %v, want the new ones", got)
	}
	h.wantFreed(t, 1, 1)
	finish(t, fresh...)
}

// A route that moves to another site or server stays, if it has a name; without one it
// is named after where it was, and is gone.
func TestReloadMovesRoutes(t *testing.T) {
	w, b := echoes(t, 1)
	routes := chat("/named", w[0], "name app") + chat("/plain", w[0], "")
	named, plain := tunnel(b[0], "name tunnels"), tunnel(b[0], "")
	h := openHouse(t, "connection_registry {\n orphan_timeout 300ms\n}", routes, named, plain)
	other := freeAddr(t)
	stay := h.join(t, 5, "/named", h.doors[0])
	goers := h.join(t, 5, "/plain", h.doors[1])
	opened := map[string]int{"app": 5, "http://" + h.addr + "#2": 5, "tunnels": 5, h.doors[1] + "#1": 5}
	h.wantContinuous(t, opened)

	began := time.Now()
	h.reload(t, h.config("", "", "", named, plain)+fmt.Sprintf("http://%s {\n config_probe\n%s respond ok\n}\n", other, routes))
	wantOut(t, began, 300*time.Millisecond, goers...)
	wantChatting(t, stay...)
	for range 2 {
		stay = append(stay, enterAt(t, other, "/named"), enterAt(t, other, "/plain"), h.pass(t, h.doors[2]), h.pass(t, h.doors[3]))
	}
	want := map[string]int{"app": 7, "http://" + other + "#2": 2, "tunnels": 7, h.doors[3] + "#1": 2}
	h.wantContinuous(t, want, "http://"+h.addr+"#2", h.doors[1]+"#1")
	if got := h.stats(t).ByRoute; !maps.Equal(got, want) {
		t.Errorf("routes: got %v, want %v", got, want)
	}
	if got, _ := knock(t, h.addr, "/named"); got != http.StatusOK {
		t.Errorf("a new client where the route was: got status %d, want the page's 200", got)
	}
	h.wantFreed(t, 2, 2, other)
	finish(t, stay...)
}

// Handlers of one name and equal settings are one route, with one count. With different
// settings, or of different kinds, they are refused; the running config goes on.
func TestReloadSharesNames(t *testing.T) {
	w, b := echoes(t, 2)
	const limit = "max_connections 7\n "
	chats := func(path, upstream, settings string) string { return chat(path, upstream, limit+settings) }
	tunnels := func(upstream, settings string) string { return tunnel(upstream, limit+settings) }
	h := openHouse(t, "", chats("/a", w[0], "name app"), tunnels(b[0], "name tunnels"))
	all := h.join(t, 3, "/a", h.doors[0])

	both := chats("/a", w[0], "name app") + chats("/b", w[0], "name app")
	h.change(t, both, tunnels(b[0], "name tunnels"), tunnels(b[0], "name tunnels"))
	all = append(all, h.join(t, 4, "/b", h.doors[1])...)
	full := func(what string) {
		t.Helper()
		if got := h.stats(t).ByRoute; !maps.Equal(got, map[string]int{"app": 7, "tunnels": 7}) {
			t.Errorf("%s: got %v, want 7 of each route", what, got)
		}
		for _, path := range []string{"/a", "/b"} {
			if got, _ := knock(t, h.addr, path); got != http.StatusServiceUnavailable {
				t.Errorf("%s: one more at %s: got status %d, want 503", what, path, got)
			}
		}
		for _, door := range h.doors[:2] {
			wantEnd(t, dialTCP(t, door))
		}
		wantChatting(t, all...)
		h.wantContinuous(t, map[string]int{"app": 7, "tunnels": 7})
	}
	full("equal settings")

	for _, tt := range []struct {
		what    string
		site    string
		tunnels []string
		want    []string // what the error says
	}{
		{"other settings", chats("/a", w[0], "name app") + chats("/b", w[0], "name app\n idle_timeout 1h"), nil, []string{`"app"`, "srv0#1", "srv0#2"}},
		{"other upstreams", chats("/a", w[0], "name app") + chats("/b", w[1], "name app"), nil, []string{`"app"`, "srv0#1", "srv0#2"}},
		{"other tunnels", both, []string{tunnels(b[0], "name tunnels"), tunnels(b[1], "name tunnels")}, []string{`"tunnels"`, h.doors[0] + "#1", h.doors[1] + "#1"}},
		{"another kind", chats("/a", w[0], "name app"), []string{tunnels(w[0], "name app")}, []string{`"app"`, "srv0#1", h.doors[0] + "#1"}},
	} {
		said := h.refused(t, h.config(tt.site, tt.tunnels...))
		for _, part := range append(tt.want, "different settings") {
			if !strings.Contains(strings.ReplaceAll(said, `\"`, `"`), part) {
				t.Errorf("%s: got error %s, want %q in it", tt.what, said, part)
			}
		}
	}
	full("configs that were refused")
	finish(t, all[:2]...)
	h.waitCount(t, 12)
	all = append(all[2:], h.join(t, 1, "/b", h.doors[1])...)
	wantChatting(t, all...)
	// Caddy's admin endpoint keeps a config that failed until the next one.
	h.change(t, both+"header X-Another config\n", tunnels(b[0], "name tunnels"), tunnels(b[0], "name tunnels"))
	h.wantFreed(t, 2, 2)
	finish(t, all...)
}
