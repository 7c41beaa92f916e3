// Package adminapi is the registry's part of Caddy's admin API: it lists live
// connections, shows, moves and ends one, and counts them.
package adminapi

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"github.com/caddyserver/caddy/v2"

	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
)

// A page of the list holds defaultLimit connections unless the request says
// otherwise, and maxLimit at most.
const (
	defaultLimit = 100
	maxLimit     = 1000
)

// Drain sets whether the upstreams of a name, in one route or, for "", in all that
// have them, are drained. It returns how many connections are to move, and false if
// there is no such upstream.
type Drain func(upstream, route string, drain bool) (conns int, found bool)

// Routes returns the API's routes.
func Routes(reg *registry.Registry, drain Drain) []caddy.AdminRoute {
	a := &api{reg: reg, drain: drain}
	return []caddy.AdminRoute{
		route("/connections", methods{http.MethodGet: a.list, http.MethodDelete: a.endAll}),
		route("/connections/stats", methods{http.MethodGet: a.stats}),
		route("/connections/upstreams", methods{http.MethodGet: a.upstreams}),
		route("/connections/drain", methods{http.MethodPost: a.beginDrain, http.MethodDelete: a.endDrain}),
		route("/connections/{id}", methods{http.MethodGet: a.show, http.MethodDelete: a.end}),
		route("/connections/{id}/migrate", methods{http.MethodPost: a.migrate}),
	}
}

type api struct {
	reg   *registry.Registry
	drain Drain
}

type methods map[string]caddy.AdminHandlerFunc

// route answers other methods with 405, as an APIError like every other refusal.
func route(pattern string, m methods) caddy.AdminRoute {
	return caddy.AdminRoute{Pattern: pattern, Handler: caddy.AdminHandlerFunc(func(w http.ResponseWriter, r *http.Request) error {
		h, ok := m[r.Method]
		if !ok {
			for name := range m {
				w.Header().Add("Allow", name)
			}
			return refuse(http.StatusMethodNotAllowed, fmt.Errorf("method not allowed: %s", r.Method))
		}
		return h(w, r)
	})}
}

// list is GET /connections.
func (a *api) list(w http.ResponseWriter, r *http.Request) error {
	q, f, err := filtered(r, "limit", "after")
	if err != nil {
		return err
	}
	limit := defaultLimit
	if v, ok := q["limit"]; ok {
		if limit, err = strconv.Atoi(v); err != nil || limit < 1 || limit > maxLimit {
			return refuse(http.StatusBadRequest, fmt.Errorf("limit must be a number from 1 to %d: %q", maxLimit, v))
		}
	}
	page, next := a.reg.List(f, limit, q["after"])
	return reply(w, struct {
		Connections []registry.View `json:"connections"`
		Next        string          `json:"next"`
	}{page, next})
}

// stats is GET /connections/stats.
func (a *api) stats(w http.ResponseWriter, r *http.Request) error {
	if _, err := query(r); err != nil {
		return err
	}
	return reply(w, a.reg.Stats())
}

// show is GET /connections/{id}.
func (a *api) show(w http.ResponseWriter, r *http.Request) error {
	if _, err := query(r); err != nil {
		return err
	}
	c, err := a.get(r)
	if err != nil {
		return err
	}
	return reply(w, c.View())
}

// migrate is POST /connections/{id}/migrate.
func (a *api) migrate(w http.ResponseWriter, r *http.Request) error {
	if _, err := query(r); err != nil {
		return err
	}
	c, err := a.get(r)
	if err != nil {
		return err
	}
	if err := c.Move(); err != nil {
		return refuse(http.StatusConflict, err)
	}
	w.WriteHeader(http.StatusAccepted)
	return nil
}

func (a *api) get(r *http.Request) (*registry.Conn, error) {
	id := r.PathValue("id")
	c, ok := a.reg.Get(id)
	if !ok {
		return nil, refuse(http.StatusNotFound, fmt.Errorf("no connection with id %q", id))
	}
	return c, nil
}

// query returns the request's parameters, of which only those named may be
// there, each once.
func query(r *http.Request, known ...string) (map[string]string, error) {
	values, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return nil, refuse(http.StatusBadRequest, fmt.Errorf("reading query: %w", err))
	}
	q := make(map[string]string, len(known))
	for _, name := range known {
		switch v := values[name]; len(v) {
		case 0:
		case 1:
			q[name] = v[0]
		default:
			return nil, refuse(http.StatusBadRequest, fmt.Errorf("repeated parameter: %s", name))
		}
		delete(values, name)
	}
	for name := range values {
		want := strings.Join(known, ", ")
		if want == "" {
			want = "none"
		}
		return nil, refuse(http.StatusBadRequest, fmt.Errorf("unknown parameter %q: want %s", name, want))
	}
	return q, nil
}

func reply(w http.ResponseWriter, v any) error {
	w.Header().Set("Content-Type", "application/json")
	if err := json.NewEncoder(w).Encode(v); err != nil {
		return refuse(http.StatusInternalServerError, err)
	}
	return nil
}

func refuse(status int, err error) error {
	return caddy.APIError{HTTPStatus: status, Err: err}
}
