// This file reloads configs that change settings and upstreams of routes, under live
// connections of both handlers.

package e2e

import (
	"fmt"
	"maps"
	"net/http"
	"testing"
	"time"
)

// Settings that a reload brings count for live connections as well: as members of their
// route, and in their own lives. Those that end nobody end nobody.
func TestReloadChangesSettings(t *testing.T) {
	w, b := echoes(t, 1)
	h := openHouse(t, "", chat("/", w[0], ""), tunnel(b[0], ""))
	all := h.join(t, 8, "/", h.doors[0])
	opened := map[string]int{"http://" + h.addr + "#1": 8, h.doors[0] + "#1": 8}
	h.wantContinuous(t, opened)
	for i, settings := range []string{
		"ping_interval 1h\n replay strict\n idle_timeout 1h\n compression off\n max_connections 8",
		"ping_interval off\n replay off\n resume_timeout off\n lb_policy first\n max_connections 8",
	} {
		h.change(t, chat("/", w[0], settings), tunnel(b[0], []string{
			"keep_alive_treatment standard\n inactivity_timeout 1h\n max_connections 8",
			"keep_alive_treatment immortal\n max_lifetime 1h\n half_open_timeout 1m\n max_connections 8",
		}[i]))
		if got, _ := knock(t, h.addr, "/"); got != http.StatusServiceUnavailable {
			t.Errorf("one client more than the new settings allow: got status %d, want 503", got)
		}
		wantEnd(t, dialTCP(t, h.doors[0]))
		wantChatting(t, all...)
		h.wantContinuous(t, opened)
		h.wantFreed(t, 1, 1)
	}
	before := h.stats(t).ClosedByReason["lifetime"]
	h.change(t, chat("/", w[0], "max_lifetime 100ms"), tunnel(b[0], "max_lifetime 100ms"))
	wantOut(t, time.Time{}, 0, all...)
	h.waitReason(t, "lifetime", before, len(all))
	h.wantContinuous(t, opened)
}

// An upstream that comes takes nobody away from the others; it gets those who are new.
func TestReloadAddsUpstreams(t *testing.T) {
	w, b := echoes(t, 2)
	h := openHouse(t, "", chat("/", w[0], "drain_window 0s"), tunnel(b[0], ""))
	all := h.join(t, 6, "/", h.doors[0])
	opened := map[string]int{"http://" + h.addr + "#1": 6, h.doors[0] + "#1": 6}
	h.wantContinuous(t, opened)
	h.change(t, chat("/", w[0]+" "+w[1], "drain_window 0s"), tunnel(b[0]+" "+b[1], ""))
	wantChatting(t, all...)
	h.wantContinuous(t, opened)
	all = append(all, h.join(t, 6, "/", h.doors[0])...)
	if got, want := h.stats(t).ByUpstream, map[string]int{w[0]: 6, w[1]: 6, b[0]: 6, b[1]: 6}; !maps.Equal(got, want) {
		t.Errorf("connections: got %v, want the new ones on the new upstreams: %v", got, want)
	}
	wantChatting(t, all...)
	h.wantContinuous(t, map[string]int{"http://" + h.addr + "#1": 12, h.doors[0] + "#1": 12})
	if got := h.value(t, fmt.Sprintf("caddy_connections_migrations_total{result=\"moved\",route=\"http://%s#1\"}", h.addr)); got != 0 {
		t.Errorf("moves: got %v, want none", got)
	}
	h.wantFreed(t, 1, 1)
	finish(t, all...)
}

// WebSockets leave an upstream that is gone; its tunnels, which cannot, run on for
// orphan_timeout and are closed over that. Those of other upstreams are not concerned.
func TestReloadRemovesUpstreams(t *testing.T) {
	w, b := echoes(t, 2)
	const window = 800 * time.Millisecond
	h := openHouse(t, fmt.Sprintf("connection_registry {\n orphan_timeout %v\n}", window),
		chat("/", w[0]+" "+w[1], "drain_window 300ms\n name app"), tunnel(b[0]+" "+b[1], "name tunnels"))
	all := h.join(t, 16, "/", h.doors[0])
	if got, want := h.stats(t).ByUpstream, map[string]int{w[0]: 8, w[1]: 8, b[0]: 8, b[1]: 8}; !maps.Equal(got, want) {
		t.Fatalf("connections: got %v, want as many on each upstream: %v", got, want)
	}
	opened := map[string]int{"app": 16, "tunnels": 16}
	h.wantContinuous(t, opened)
	before := h.stats(t).ClosedByReason["orphan"]
	began := time.Now()
	h.change(t, chat("/", w[1], "drain_window 300ms\n name app"), tunnel(b[1], "name tunnels"))
	h.waitReason(t, "orphan", before, 8)
	var stay, gone []*resident
	if !eventually(20*time.Second, func() bool {
		stay, gone = nil, nil
		for i, r := range all {
			if i%2 == 1 && r.over() {
				gone = append(gone, r)
			} else {
				stay = append(stay, r)
			}
		}
		return len(gone) >= 8
	}) {
		t.Errorf("tunnels that were closed: got %d, want 8", len(gone))
	}
	wantClosed(t, 0, began, window, gone...)
	h.waitOn(t, 20*time.Second, map[string]int{w[1]: 16, b[1]: 8})
	wantChatting(t, stay...)
	h.wantContinuous(t, opened)
	h.wantMetrics(t, map[string]string{
		`caddy_connections_migrations_total{result="moved",route="app"}`:                           "8",
		`caddy_connections_closed_total{kind="passthrough",reason="orphan",route="tunnels"}`:       "8",
		`caddy_connections_active{kind="websocket",route="app",state="open"}`:                      "16",
		fmt.Sprintf(`caddy_connections_upstream_connections{route="tunnels",upstream="%s"}`, b[1]): "8",
	})
	h.wantFreed(t, 1, 1)
	finish(t, stay...)
}
