// This file tests listings over HTTP.

package adminapi

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
)

func TestListIsNeverNull(t *testing.T) {
	s := newSite(t)
	const want = `{"connections":[],"next":""}`
	for _, target := range []string{"/connections", "/connections?route=none", "/connections?after=none"} {
		res, body := s.ask(http.MethodGet, target)
		if res.StatusCode != http.StatusOK || strings.TrimSpace(body) != want {
			t.Errorf("%s: got %d %s, want 200 %s", target, res.StatusCode, body, want)
		}
	}
}

func TestListShowsConnections(t *testing.T) {
	s := newSite(t)
	c, _ := s.open("a", "app:80", "10.0.0.1")
	var got list
	s.get("/connections", &got)
	if len(got.Connections) != 1 || got.Next == nil || *got.Next != "" {
		t.Fatalf("got %+v, want one connection and no next page", got)
	}
	v := got.Connections[0]
	if time.Since(v.OpenedAt) > time.Minute {
		t.Errorf("got opened_at %v, want now", v.OpenedAt)
	}
	v.OpenedAt, v.Age, v.Idle = time.Time{}, 0, 0
	if want := (registry.View{
		ID: c.ID(), Kind: registry.WebSocket, Route: "a", State: "open", Client: "10.0.0.1", Upstream: "app:80", Dial: "app:80",
		Host: "example.com", URI: "/chat", Protocol: "h1",
	}); v != want {
		t.Errorf("got %+v, want %+v", v, want)
	}
}

func TestListFilters(t *testing.T) {
	s := newSite(t)
	a, _ := s.open("a", "app:80", "10.0.0.1")
	b, _ := s.open("route with space & more", "unix//run/app.sock", "2001:db8::1")
	c, _ := s.open("a", "app:80", "10.0.0.2")
	c.Close(registry.Ending{Reason: registry.Idle})
	all := []*registry.Conn{a, b, c}
	for _, test := range []struct {
		query string
		want  []*registry.Conn
	}{
		{"", all},
		{values("kind", "websocket"), all},
		{values("kind", "passthrough"), nil},
		{values("route", "a"), []*registry.Conn{a, c}},
		{values("route", "route with space & more"), []*registry.Conn{b}},
		{values("upstream", "unix//run/app.sock"), []*registry.Conn{b}},
		{values("client", "2001:db8::1"), []*registry.Conn{b}},
		{values("client", "2001:DB8:0::1"), []*registry.Conn{b}},
		{values("client", "::ffff:10.0.0.1"), []*registry.Conn{a}},
		{values("state", "open"), []*registry.Conn{a, b}},
		{values("state", "closing"), []*registry.Conn{c}},
		{values("state", "connecting"), nil},
		{values("min_age", "0"), all},
		{values("min_age", "0s"), all},
		{values("min_age", "3600"), nil},
		{values("min_age", "1h30m"), nil},
		{values("min_age", "7d"), nil},
		{values("route", "a", "state", "open", "client", "10.0.0.1", "upstream", "app:80", "kind", "websocket"), []*registry.Conn{a}},
		{values("route", "a", "client", "2001:db8::1"), nil},
		{values("after", a.ID()), []*registry.Conn{b, c}},
		{values("after", c.ID()), nil},
		{values("after", a.ID(), "route", "a"), []*registry.Conn{c}},
	} {
		want := []string{}
		for _, c := range test.want {
			want = append(want, c.ID())
		}
		var got list
		s.get("/connections"+test.query, &got)
		if !slices.Equal(got.ids(), want) {
			t.Errorf("%q: got %v, want %v", test.query, got.ids(), want)
		}
	}
}

func TestListRefusesBadFilters(t *testing.T) {
	s := newSite(t)
	for _, query := range []string{
		"?kind=", "?kind=http", "?kind=WebSocket", "?state=", "?state=OPEN", "?state=1", "?state=none",
		"?route=", "?upstream=", "?client=", "?client=localhost", "?client=10.0.0.0/8",
		"?min_age=", "?min_age=x", "?min_age=-1", "?min_age=-5s", "?min_age=1.5", "?min_age=5%20s",
		"?limit=", "?limit=0", "?limit=-1", "?limit=1001", "?limit=x", "?limit=1.5", "?limit=99999999999999999999", "?limit=%201",
	} {
		res, body := s.ask(http.MethodGet, "/connections"+query)
		name, value, _ := strings.Cut(strings.TrimPrefix(query, "?"), "=")
		value = strings.ReplaceAll(value, "%20", " ")
		if res.StatusCode != http.StatusBadRequest || !strings.Contains(body, name) || !strings.Contains(body, fmt.Sprintf("%q", value)) {
			t.Errorf("%s: got %d %q, want 400 with name and value", query, res.StatusCode, body)
		}
	}
}

func TestPages(t *testing.T) {
	s := newSite(t)
	var want []string
	for range 1005 {
		c, _ := s.open("a", "app:80", "10.0.0.1")
		want = append(want, c.ID())
	}
	for _, test := range []struct {
		query string
		size  int
	}{{"", 100}, {"limit=1000", 1000}, {"limit=7", 7}, {"limit=1000&route=a", 1000}} {
		var got []string
		after := ""
		for {
			query := "?" + test.query
			if after != "" {
				query += "&after=" + after
			}
			var page list
			s.get("/connections"+query, &page)
			if len(page.Connections) != min(test.size, len(want)-len(got)) {
				t.Fatalf("%q: got a page of %d after %d, want %d at most", test.query, len(page.Connections), len(got), test.size)
			}
			got = append(got, page.ids()...)
			if after = *page.Next; after == "" {
				break
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("%q: got %d connections, want all %d in order of age", test.query, len(got), len(want))
		}
	}
	var one list
	s.get("/connections?limit=1", &one)
	if len(one.Connections) != 1 || *one.Next != want[0] {
		t.Errorf("got %d connections, next %v, want the first alone", len(one.Connections), one.Next)
	}
}
