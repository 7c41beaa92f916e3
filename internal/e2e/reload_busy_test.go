// This file reloads configs at bad moments: some fail, connections are held or on their
// way to another backend, or the next config is there before anybody has had a breath.

package e2e

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/gobwas/ws"
)

// A config that fails when it starts, be it before or after the registry's part of it,
// changes nothing: not who is where, nor what counts, nor who may come.
func TestReloadFailsLate(t *testing.T) {
	w, b := echoes(t, 2)
	h := openHouse(t, "connection_registry {\n orphan_timeout 0s\n}",
		chat("/", w[0], "drain_window 0s\n name app"), tunnel(b[0], "name tunnels"))
	all := h.join(t, 5, "/", h.doors[0])
	opened := map[string]int{"app": 5, "tunnels": 5}
	h.wantContinuous(t, opened)
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	// Apps are started in random order: in half of the attempts, ours are first.
	blocked := fmt.Sprintf("http://%s {\n bind 127.0.0.1\n respond taken\n}\n", taken.Addr())
	real := h.doors[3]
	h.doors[3] = taken.Addr().String()
	// (The only server of layer4: caddy-l4 v0.1.2 leaves those open that it has started
	// before one that fails.)
	alone := h.config(chat("/", w[1], "drain_window 0s\n name app"), "", "", "", tunnel(b[1], "name tunnels"))
	h.doors[3] = real
	for range 4 {
		for what, config := range map[string]string{
			"routes are gone":  h.config("", "") + blocked,
			"other names":      h.config(chat("/", w[0], "name other"), tunnel(b[0], "name others")) + blocked,
			"other upstreams":  h.config(chat("/", w[1], "drain_window 0s\n name app"), tunnel(b[1], "name tunnels")) + blocked,
			"lower limits":     h.config(chat("/", w[0], "name app\n max_connections 1\n max_lifetime 1ms"), tunnel(b[0], "name tunnels\n max_connections 1\n max_lifetime 1ms")) + blocked,
			"layer4 cannot":    alone,
			"not even adapted": h.config(chat("/", w[1], "name app\n no_such_subdirective"), ""),
		} {
			h.refused(t, config)
			for i, r := range all {
				if r.over() {
					t.Fatalf("%s: client %d: %v", what, i, r.end)
				}
			}
		}
		all = append(all, h.join(t, 1, "/", h.doors[0])...) // by the config that runs
		opened["app"]++
		opened["tunnels"]++
	}
	wantChatting(t, all...)
	h.wantContinuous(t, opened)
	if got, want := h.stats(t).ByUpstream, map[string]int{w[0]: 9, b[0]: 9}; !maps.Equal(got, want) {
		t.Errorf("connections: got %v, want %v", got, want)
	}
	h.change(t, chat("/", w[0], "name app"), tunnel(b[0], "name tunnels")) // frees Caddy's admin endpoint of a failed one
	wantChatting(t, all...)
	h.wantFreed(t, 1, 1)
	finish(t, all...)
}

// Clients that are held stay so through reloads, and come to where the latest config
// says; those whose route is gone are told. Tunnels are not concerned.
func TestReloadWhileHeld(t *testing.T) {
	const clients = 12
	a, b := startBackend(t, "coder", "a"), startBackend(t, "gorilla", "b")
	_, bytes := echoes(t, 1)
	tunnels := tunnel(bytes[0], "name tunnels")
	site := func(to *backendProcess, n int, more string) string {
		return chat("/", to.addr, fmt.Sprintf("name app\n resume_interval 5ms %dms\n %s", 50+n, more))
	}
	h := openHouse(t, "connection_registry {\n orphan_timeout 200ms\n}", site(a, 0, ""), tunnels)
	stay := h.join(t, 5, "", h.doors[0])
	opened := map[string]int{"app": clients, "tunnels": 5}
	var all []*talker
	for i := range clients {
		all = append(all, startTalker(t, h.proxy, i, "/"))
	}
	h.wantContinuous(t, opened)
	inState := func(what, state string) {
		t.Helper()
		if !eventually(20*time.Second, func() bool { return h.stats(t).ByState[state] >= clients }) {
			t.Fatalf("%s: got %v, want all %d %s", what, h.stats(t).ByState, clients, state)
		}
	}
	kill(t, a)
	inState("the backend is killed", "held")
	for n := range 3 {
		h.change(t, site(a, n+1, ""), tunnels)
		inState("a reload", "held")
	}
	h.wantContinuous(t, opened)
	h.change(t, site(b, 0, ""), tunnels)
	inState("a reload to another upstream", "open")
	h.waitOn(t, 10*time.Second, map[string]int{b.addr: clients, bytes[0]: 5})

	// The backend comes back while config follows config.
	kill(t, b)
	inState("the second backend is killed", "held")
	b.restart(t)
	for n := range 5 {
		h.change(t, site(b, n+1, ""), tunnels)
	}
	inState("the backend is back", "open")
	h.wantContinuous(t, opened)
	wantChatting(t, stay...)
	h.wantFreed(t, 1, 1)
	finishTalkers(t, all)
	of := make(map[int][]*backendConn)
	for _, conns := range backendConns(t, a, b) {
		of[senderOf(conns)] = conns
	}
	for _, k := range all {
		del := &delivery{client: k.id, sent: int(k.sent.Load()), ended: k.end, conns: of[k.id]}
		for _, fault := range del.faults(killPromises["unacked"], 1006) {
			t.Error(fault)
		}
	}

	// Nobody is held for a route that is gone.
	var orphans []*resident
	for range 3 {
		orphans = append(orphans, h.enter(t, "/?echo=1"))
	}
	kill(t, b)
	if !eventually(20*time.Second, func() bool { return h.stats(t).ByState["held"] == len(orphans) }) {
		t.Fatalf("states: got %v, want %d held", h.stats(t).ByState, len(orphans))
	}
	before := h.stats(t).ClosedByReason["orphan"]
	h.change(t, "", tunnels)
	wantClosed(t, 1001, time.Now(), 0, orphans...)
	h.waitReason(t, "orphan", before, len(orphans))
	h.wantContinuous(t, map[string]int{"tunnels": 5}, "app")
	finish(t, stay...)
}

// Connections that are between two backends get through reloads, also to one that takes
// the new backend away again. Nothing is lost or comes twice.
func TestReloadWhileMigrating(t *testing.T) {
	const clients = 10
	old := startWitness(t)
	hold := make(chan struct{})
	old.hold = hold
	w, b := echoes(t, 2)
	tunnels := tunnel(b[0], "name tunnels")
	site := func(to, more string) string { return chat("/", to, "name app\n drain_window 0s\n "+more) }
	h := openHouse(t, "", site(old.addr, ""), tunnels)
	stay := h.join(t, 5, "", h.doors[0])
	var all []*rawConn
	for range clients {
		status, c := knock(t, h.addr, "/")
		if status != http.StatusSwitchingProtocols {
			t.Fatalf("got status %d, want 101", status)
		}
		_ = c.SetDeadline(time.Now().Add(2 * time.Minute))
		c.send(t, ws.OpText, "one")
		c.wantText(t, "echo one")
		all = append(all, c)
	}
	opened := map[string]int{"app": clients, "tunnels": 5}
	h.wantContinuous(t, opened)
	h.change(t, site(w[0], ""), tunnels)
	if !eventually(20*time.Second, func() bool { return h.stats(t).ByState["migrating"] == clients }) {
		t.Fatalf("states: got %v, want all migrating", h.stats(t).ByState)
	}
	for _, c := range all {
		c.send(t, ws.OpText, "two")
	}
	h.change(t, site(w[0], "replay strict\n idle_timeout 1h"), tunnels)
	h.change(t, site(w[1], "replay unsent"), tunnels) // where they are about to go is gone again
	h.wantContinuous(t, opened)
	close(hold)
	before := 0 // it got there before the old backend was told
	for _, c := range all {
		h, got, err := c.receive()
		switch {
		case err != nil || h.OpCode != ws.OpText || strings.TrimPrefix(got, "echo ") != "two":
			t.Fatalf("got %v %q, %v; want an echo", h.OpCode, got, err)
		case got != "two":
			before++
		}
	}
	h.waitOn(t, 20*time.Second, map[string]int{w[1]: clients, b[0]: 5})
	for _, c := range all {
		c.send(t, ws.OpText, "three")
		c.wantText(t, "three")
		c.sendClose(t, 1000, "")
		if code, _, before, err := c.receiveClose(); err != nil || code != 1000 || len(before) > 0 {
			t.Errorf("close: got %d after %q, %v; want 1000 after nothing", code, before, err)
		}
	}
	requests, texts, code := old.got()
	if len(requests) != clients || len(texts) != clients+before || code != 1001 {
		t.Errorf("the backend that was left: got %d connections, %d messages, close code %d; want %d, %d, 1001",
			len(requests), len(texts), code, clients, clients+before)
	}
	wantChatting(t, stay...)
	h.wantContinuous(t, opened)
	h.wantFreed(t, 1, 1)
	finish(t, stay...)
}

// Config follows config, 50 in 10 s or as many as the machine can: with other settings,
// other upstreams, and routes that come and go. Nobody of the routes that stay notices,
// and in the end there is one config in memory.
func TestReloadStorm(t *testing.T) {
	const reloads, limit = 50, 10 * time.Second
	w, b := echoes(t, 3)
	h := openHouse(t, "connection_registry {\n orphan_timeout 1h\n}", chat("/", w[0]+" "+w[1]+" "+w[2], "name app"), tunnel(b[0]+" "+b[1]+" "+b[2], "name tunnels"))
	all := h.join(t, 15, "/", h.doors[0])
	opened := map[string]int{"app": 15, "tunnels": 15}
	h.wantContinuous(t, opened)
	pace := time.NewTicker(limit / reloads)
	defer pace.Stop()
	began, n := time.Now(), 0
	for ; n < reloads && time.Since(began) < limit; n++ {
		i := n % 3
		site := chat("/", w[i]+" "+w[(i+1)%3], fmt.Sprintf("name app\n drain_window %dms\n idle_timeout %dm", rand.IntN(400), n+10))
		routes := tunnel(b[i]+" "+b[(i+1)%3], fmt.Sprintf("name tunnels\n inactivity_grace %dm", n+1))
		if n%2 == 0 {
			h.change(t, site+chat("/other", w[0], ""), routes, tunnel(b[0], "name others"))
		} else {
			h.change(t, site, routes)
		}
		if full {
			<-pace.C
		}
	}
	t.Logf("%d reloads in %v", n, time.Since(began))
	wantChatting(t, all...)
	// All upstreams are back before the tunnels of one that was gone are closed.
	h.change(t, chat("/", w[0]+" "+w[1]+" "+w[2], "name app"), tunnel(b[0]+" "+b[1]+" "+b[2], "name tunnels"))
	wantChatting(t, all...)
	h.wantContinuous(t, opened)
	if got := h.stats(t); got.ByState["open"]+got.ByState["migrating"] != len(all) || !maps.Equal(got.ByRoute, opened) {
		t.Errorf("connections: got %v of %v, want all of them", got.ByState, got.ByRoute)
	}
	h.wantFreed(t, 1, 1)
	finish(t, all...)
}
