// This file tests moving one connection.

package adminapi

import (
	"errors"
	"net/http"
	"strings"
	"testing"

	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
)

// mover is an owner that counts how often it is to move, and may refuse.
type mover struct {
	owner
	err   error
	moves int
}

func (m *mover) Move() error {
	m.moves++
	return m.err
}

// movable makes an open connection.
func (s *site) movable() (*registry.Conn, *mover) {
	s.t.Helper()
	c, _ := s.open("a", "app:80", "10.0.0.1")
	m := new(mover)
	c.Handover(m)
	return c, m
}

func TestMigrate(t *testing.T) {
	s := newSite(t)
	c, m := s.movable()
	_, other := s.movable()
	res, body := s.ask(http.MethodPost, "/connections/"+c.ID()+"/migrate")
	if res.StatusCode != http.StatusAccepted || body != "" {
		t.Errorf("got %d %q, want 202 and no body", res.StatusCode, body)
	}
	if m.moves != 1 || other.moves != 0 || len(m.ends) != 0 {
		t.Errorf("got the owner asked to move %d times, another %d times, ended %v; want once, and only this one", m.moves, other.moves, m.ends)
	}
}

// What the owner says is why.
func TestMigrateRefused(t *testing.T) {
	s := newSite(t)
	c, m := s.movable()
	m.err = errors.New("it is on its way already")
	res, body := s.ask(http.MethodPost, "/connections/"+c.ID()+"/migrate")
	if res.StatusCode != http.StatusConflict || body != m.err.Error() || m.moves != 1 {
		t.Errorf("got %d %q after %d attempts, want 409 and why", res.StatusCode, body, m.moves)
	}
}

func TestMigrateNobody(t *testing.T) {
	s := newSite(t)
	c, m := s.movable()
	c.Close(registry.Ending{Reason: registry.Idle})
	c.Done()
	for _, id := range []string{c.ID(), "none", "00000000-0000-0000-0000-000000000000", strings.ToUpper(c.ID()), "%2e%2e"} {
		if res, body := s.ask(http.MethodPost, "/connections/"+id+"/migrate"); res.StatusCode != http.StatusNotFound || body == "" {
			t.Errorf("%s: got %d %q, want 404 and why", id, res.StatusCode, body)
		}
	}
	if m.moves != 0 {
		t.Error("got the owner of a connection that is gone asked to move it")
	}
}

// What the API shows of a connection that was moved and is held.
func TestStatesBetweenBackends(t *testing.T) {
	s := newSite(t)
	c, _ := s.open("a", "app:80", "10.0.0.1")
	s.open("a", "app:80", "10.0.0.1")
	one := func(query string) registry.View {
		t.Helper()
		var got list
		s.get("/connections"+query, &got)
		if len(got.Connections) != 1 || got.Connections[0].ID != c.ID() {
			t.Fatalf("%s: got %+v, want the one", query, got)
		}
		return got.Connections[0]
	}
	c.Migrate()
	if v := one("?state=migrating"); v.State != "migrating" || v.Upstream != "app:80" {
		t.Errorf("migrating: got %+v, want it on the old upstream", v)
	}
	if v := one("?state=migrating&upstream=app:80"); v.Dial != "app:80" {
		t.Errorf("migrating: got %+v", v)
	}
	c.TakeOver(c.Route().Choose(func(func(string) registry.Load) string { return "app:81" }), "10.1.1.2:81", 7)
	c.SetBuffered(4096)
	if v := one("?upstream=app:81"); v.State != "open" || v.Dial != "10.1.1.2:81" || v.Resumes != 1 || v.Replayed != 7 || v.Buffered != 4096 {
		t.Errorf("moved: got %+v, want one resume, 7 replayed, 4096 bytes buffered", v)
	}
	c.Hold()
	if v := one("?state=held"); v.State != "held" || v.Upstream != "" || v.Dial != "" || v.Resumes != 1 || v.Replayed != 7 {
		t.Errorf("held: got %+v, want no upstream", v)
	}
	var stats registry.Stats
	s.get("/connections/stats", &stats)
	if stats.ByState["held"] != 1 || stats.ByState["open"] != 1 || len(stats.ByUpstream) != 1 || stats.ByUpstream["app:80"] != 1 {
		t.Errorf("got %+v, want one held, one open on app:80", stats)
	}
	var got list
	if s.get("/connections?state=migrating", &got); len(got.Connections) != 0 {
		t.Errorf("got %+v, want none migrating any more", got)
	}
}
