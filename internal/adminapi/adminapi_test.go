// This file tests routing, methods and parameters of the admin API, and holds
// what its tests share.

package adminapi

import (
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"

	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
)

// owner keeps what it is told. Its methods are called in the test's goroutine or
// while the test waits for an answer.
type owner struct{ ends []registry.Ending }

func (o *owner) End(e registry.Ending) { o.ends = append(o.ends, e) }
func (o *owner) Abort()                {}
func (o *owner) Reconsider()           {}
func (o *owner) Move() error           { return nil }

// site is an admin API over a registry of its own.
type site struct {
	t   *testing.T
	reg *registry.Registry
	mux *http.ServeMux
}

func newSite(t *testing.T) *site {
	t.Helper()
	s := &site{t: t, reg: registry.New(), mux: http.NewServeMux()}
	for _, route := range Routes(s.reg, s.drain) {
		s.mux.HandleFunc(route.Pattern, func(w http.ResponseWriter, r *http.Request) {
			err := route.Handler.ServeHTTP(w, r)
			if err == nil {
				return
			}
			var refusal caddy.APIError
			if !errors.As(err, &refusal) || refusal.Err == nil {
				t.Errorf("%s %s: got error %v, want an APIError", r.Method, r.URL, err)
				return
			}
			w.WriteHeader(refusal.HTTPStatus)
			_, _ = io.WriteString(w, refusal.Err.Error())
		})
	}
	return s
}

// drain is what the config does about a drain, here for connections that do not move.
func (s *site) drain(upstream, route string, drain bool) (conns int, found bool) {
	found = len(s.reg.Drain(upstream, route, drain)) > 0
	for _, n := range s.reg.Stats().ByUpstream {
		conns += n
	}
	return conns, found
}

// open makes an open connection.
func (s *site) open(route, upstream, client string) (*registry.Conn, *owner) {
	s.t.Helper()
	o := new(owner)
	to := s.reg.Retain(registry.WebSocket, route)
	c, err := s.reg.Admit(to, registry.Info{Kind: registry.WebSocket, Client: client, Host: "example.com", URI: "/chat", Protocol: "h1"}, o)
	if err != nil {
		s.t.Fatal(err)
	}
	c.Attempt(to.Choose(func(func(string) registry.Load) string { return upstream }), upstream, time.Time{})
	c.Open("")
	return c, o
}

// ask returns an answer and its body.
func (s *site) ask(method, target string) (*http.Response, string) {
	s.t.Helper()
	w := httptest.NewRecorder()
	s.mux.ServeHTTP(w, httptest.NewRequest(method, target, http.NoBody))
	return w.Result(), w.Body.String()
}

// get decodes the answer to a GET that must succeed.
func (s *site) get(target string, into any) {
	s.t.Helper()
	res, body := s.ask(http.MethodGet, target)
	if res.StatusCode != http.StatusOK || res.Header.Get("Content-Type") != "application/json" {
		s.t.Fatalf("GET %s: got %d with Content-Type %q: %s", target, res.StatusCode, res.Header.Get("Content-Type"), body)
	}
	d := json.NewDecoder(strings.NewReader(body))
	d.DisallowUnknownFields()
	if err := d.Decode(into); err != nil {
		s.t.Fatalf("GET %s: %v: %s", target, err, body)
	}
}

// list is the answer to GET /connections.
type list struct {
	Connections []registry.View `json:"connections"`
	Next        *string         `json:"next"`
}

func (l list) ids() []string {
	out := []string{}
	for _, v := range l.Connections {
		out = append(out, v.ID)
	}
	return out
}

func TestOtherMethodsAreRefused(t *testing.T) {
	s := newSite(t)
	c, o := s.open("a", "app:80", "10.0.0.1")
	for target, allowed := range map[string][]string{
		"/connections":                        {"DELETE", "GET"},
		"/connections/stats":                  {"GET"},
		"/connections/" + c.ID():              {"DELETE", "GET"},
		"/connections/" + c.ID() + "/migrate": {"POST"},
		"/connections/none/migrate":           {"POST"},
	} {
		for _, method := range []string{"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "BREW"} {
			if slices.Contains(allowed, method) {
				continue
			}
			res, body := s.ask(method, target)
			got := res.Header.Values("Allow")
			slices.Sort(got)
			if res.StatusCode != http.StatusMethodNotAllowed || !slices.Equal(got, allowed) {
				t.Errorf("%s %s: got %d, Allow %q, want 405, %q: %s", method, target, res.StatusCode, got, allowed, body)
			}
		}
	}
	if len(o.ends) != 0 {
		t.Errorf("got the connection ended: %v", o.ends)
	}
}

func TestUnknownAndRepeatedParameters(t *testing.T) {
	s := newSite(t)
	c, o := s.open("a", "app:80", "10.0.0.1")
	for _, test := range []struct{ method, target string }{
		{"GET", "/connections?colour=red"},
		{"GET", "/connections?Route=a"},
		{"GET", "/connections?route=a&route=b"},
		{"GET", "/connections?limit=1&limit=1"},
		{"GET", "/connections?=x"},
		{"GET", "/connections?route=%zz"},
		{"GET", "/connections?route=a;state=open"},
		{"GET", "/connections?code=1001"},
		{"GET", "/connections?reason=idle"},
		{"GET", "/connections/stats?route=a"},
		{"GET", "/connections/" + c.ID() + "?route=a"},
		{"GET", "/connections/" + c.ID() + "?code=1001"},
		{"DELETE", "/connections/" + c.ID() + "?colour=red"},
		{"DELETE", "/connections/" + c.ID() + "?code=1001&code=1001"},
		{"DELETE", "/connections/" + c.ID() + "?route=a"},
		{"POST", "/connections/" + c.ID() + "/migrate?to=app:81"},
		{"POST", "/connections/none/migrate?to=app:81"},
	} {
		if res, body := s.ask(test.method, test.target); res.StatusCode != http.StatusBadRequest || body == "" {
			t.Errorf("%s %s: got %d %q, want 400 and why", test.method, test.target, res.StatusCode, body)
		}
	}
	if len(o.ends) != 0 {
		t.Errorf("got the connection ended: %v", o.ends)
	}
}

func TestStats(t *testing.T) {
	s := newSite(t)
	var empty map[string]any
	s.get("/connections/stats", &empty)
	for _, name := range []string{"total", "by_kind", "by_route", "by_upstream", "by_state", "closed_by_reason", "age_seconds"} {
		if v, ok := empty[name]; !ok || v == nil {
			t.Errorf("%s: got %v (there: %t), want a value", name, v, ok)
		}
	}
	s.open("a", "app:80", "10.0.0.1")
	c, _ := s.open("b", "app:81", "10.0.0.1")
	s.ask("DELETE", "/connections/"+c.ID())
	var got registry.Stats
	s.get("/connections/stats", &got)
	if got.Total != 2 || got.ByRoute["a"] != 1 || got.ByUpstream["app:81"] != 1 || got.ByState["closing"] != 1 || got.AgeSeconds.LE["+Inf"] != 2 {
		t.Errorf("got %+v, want the two connections", got)
	}
	c.Done()
	got = registry.Stats{}
	s.get("/connections/stats", &got)
	if got.Total != 1 || got.ClosedByReason[registry.Admin] != 1 {
		t.Errorf("got %+v, want one left, one closed", got)
	}
}

// values makes a query.
func values(pairs ...string) string {
	q := url.Values{}
	for i := 0; i+1 < len(pairs); i += 2 {
		q.Add(pairs[i], pairs[i+1])
	}
	return "?" + q.Encode()
}
