// This file reads the log: the access log of WebSockets, and what is told of old
// connections.

package e2e

import (
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gobwas/ws"
)

// logEntry is a line of the log.
type logEntry map[string]any

// logFile is a file to which everything is logged that the plugin says, and the global
// option for it.
func logFile(t *testing.T) (file, option string) {
	t.Helper()
	file = filepath.Join(t.TempDir(), "own.log")
	return file, "log own {\noutput file " + file + "\nlevel INFO\ninclude http.handlers.websocket_proxy layer4.handlers.sni_passthrough connection_registry\n}\n"
}

// logged returns the entries with a message.
func logged(file, msg string) (all []logEntry) {
	text, _ := os.ReadFile(file)
	for line := range strings.Lines(string(text)) {
		var e logEntry
		if json.Unmarshal([]byte(line), &e) == nil && e["msg"] == msg {
			all = append(all, e)
		}
	}
	return all
}

// waitLogged waits until there are so many entries with a message.
func waitLogged(t *testing.T, file, msg string, n int) (all []logEntry) {
	t.Helper()
	if !eventually(20*time.Second, func() bool { all = logged(file, msg); return len(all) >= n }) {
		t.Fatalf("%q: got %v, want %d entries", msg, all, n)
	}
	return all
}

// Each WebSocket has one entry in the access log of a route that asks for it: when nothing
// is left of it, also if it was moved, and none if no upstream accepted it. C15.
func TestWebSocketAccessLog(t *testing.T) {
	const fields = "bytes_in bytes_out dial duration host id kind messages_in messages_out protocol reason remote replayed resumes route sni subprotocol upstream uri"
	backend := rawBackend(t, echoRaw)
	file, option := logFile(t)
	// The binary, because Caddy closes a log with the next config only.
	p := startBinary(t, option, fmt.Sprintf("websocket_proxy /quiet %[1]s {\n name quiet\n}\nwebsocket_proxy /dead %[2]s {\n name dead\n log\n}\nwebsocket_proxy %[1]s {\n name told\n log\n}",
		backend, freeAddr(t)))
	open := func(path string) *rawConn {
		t.Helper()
		res, c := rawRequest(t, p.addr, strings.Replace(rawUpgrade(p.addr, ""), "/chat?x=1", path, 1))
		if path != "/dead" && res.StatusCode != http.StatusSwitchingProtocols {
			t.Fatalf("%s: got status %d", path, res.StatusCode)
		}
		return c
	}
	want := make(map[string]string) // reasons by id
	end := func(c *rawConn, reason string) {
		t.Helper()
		if reason != "" {
			want[p.connections(t)[0].ID] = reason
		}
		if reason == "client_closed" {
			c.sendClose(t, 1000, "")
			_, _, _, _ = c.receiveClose()
		}
		c.Close()
		p.waitCount(t, 0)
	}
	first := open("/told?token=1")
	first.send(t, ws.OpText, "hello")
	first.wantText(t, "hello")
	moved := p.connections(t)[0].ID
	end(first, "client_closed")
	end(open("/told"), "client_gone")
	end(open("/quiet"), "")
	end(open("/dead"), "")
	// What came before is written by now.
	end(open("/last"), "client_gone")
	waitLogged(t, file, "connection ended", len(want))
	got := logged(file, "connection ended")
	if len(got) != len(want) {
		t.Errorf("got %d entries, want one of each of %d connections: %v", len(got), len(want), got)
	}
	for _, e := range got {
		id, _ := e["id"].(string)
		if e["reason"] != want[id] || e["route"] != "told" || e["kind"] != "websocket" {
			t.Errorf("got %v, want reason %q", e, want[id])
		}
		delete(want, id)
		if names := namesOf(e); names != fields {
			t.Errorf("got fields %s, want %s", names, fields)
		}
		if id == moved && (e["bytes_in"] != 5.0 || e["messages_out"] != 1.0 || e["uri"] != "/told?token=1" || e["upstream"] != backend || e["dial"] != backend || e["remote"] != "127.0.0.1" || e["duration"].(float64) <= 0) {
			t.Errorf("got %v, want what the client did", e)
		}
	}
}

// namesOf returns the fields of an entry, but for those that every entry has.
func namesOf(e logEntry) string {
	var names []string
	for name := range e {
		if !slices.Contains([]string{"level", "ts", "logger", "msg"}, name) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return strings.Join(names, " ")
}

// A connection of either kind that gets as old as long_lived is told of, once. K23.
func TestLongLivedIsLogged(t *testing.T) {
	backend, tunnels := rawBackend(t, echoRaw), freeAddr(t)
	file, option := logFile(t)
	p := startBinary(t, option+"connection_registry {\n long_lived 1s\n}\nlayer4 {\n"+tunnels+" {\n"+toAll(echoBackend(t, nil)+" {\n name tunnels\n}")+"}\n}",
		"websocket_proxy "+backend+" {\n name chat\n}")
	const told = "connection is long-lived"
	rawDial(t, p.addr, "")
	wantEcho(t, dialTCP(t, tunnels), "hello")
	waitLogged(t, file, told, 2)
	// The next one gets old a look at all connections later, at least.
	rawDial(t, p.addr, "")
	all := waitLogged(t, file, told, 3)
	routes := make(map[any]int)
	ids := make(map[any]bool)
	for _, e := range all {
		routes[e["route"]]++
		ids[e["id"]] = true
		if age, _ := e["duration"].(float64); age < 1 || e["remote"] != "127.0.0.1" || e["upstream"] == "" {
			t.Errorf("got %v, want who it is", e)
		}
	}
	if len(all) != 3 || len(ids) != 3 || routes["chat"] != 2 || routes["tunnels"] != 1 {
		t.Errorf("got %v, want each of three connections once", all)
	}
}

// Pressure is told of when it begins and when it is over, and counts from the next config
// on as that has it. C29.
func TestPressureIsLogged(t *testing.T) {
	backend := rawBackend(t, echoRaw)
	file, option := logFile(t)
	globals := func(percent int) string {
		return option + fmt.Sprintf("connection_registry {\n max_connections 4\n pressure %d\n}", percent)
	}
	site := "websocket_proxy " + backend
	p := startBinary(t, globals(100), site)
	const near, far = "max_connections is near, ending connections give way", "max_connections is far again"
	conns := []*rawConn{rawDial(t, p.addr, ""), rawDial(t, p.addr, ""), rawDial(t, p.addr, "")}
	if got := logged(file, near); len(got) > 0 {
		t.Errorf("got %v below the mark, want nothing", got)
	}
	p.reload(t, p.siteConfig(globals(75), site))
	if e := waitLogged(t, file, near, 1)[0]; e["count"] != 3.0 || e["limit"] != 4.0 {
		t.Errorf("got %v, want 3 of 4", e)
	}
	conns[0].Close()
	if e := waitLogged(t, file, far, 1)[0]; e["count"] != 2.0 {
		t.Errorf("got %v, want 2", e)
	}
	if got := logged(file, near); len(got) != 1 {
		t.Errorf("got %v, want it told once", got)
	}
}
