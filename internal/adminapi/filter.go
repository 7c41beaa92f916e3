// This file reads which connections a request is about.

package adminapi

import (
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"time"

	"github.com/caddyserver/caddy/v2"

	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
)

// filters are the parameters that select connections.
var filters = []string{"kind", "route", "upstream", "state", "client", "min_age"}

// filtered returns the request's parameters, of which there may be those named beside
// those of a filter, and the filter.
func filtered(r *http.Request, known ...string) (q map[string]string, f registry.Filter, err error) {
	q, err = query(r, slices.Concat(filters, known)...)
	if err != nil {
		return nil, f, err
	}
	if f, err = filter(q); err != nil {
		return nil, f, refuse(http.StatusBadRequest, err)
	}
	return q, f, nil
}

// filter reads the parameters that select connections. An empty one is an error: a
// script's variable that is not set must not select all.
func filter(q map[string]string) (f registry.Filter, err error) {
	for _, name := range filters {
		if v, ok := q[name]; ok && v == "" {
			return f, fmt.Errorf("%s is empty: %q", name, v)
		}
	}
	f.Route, f.Upstream = q["route"], q["upstream"]
	if v, ok := q["client"]; ok {
		ip, err := netip.ParseAddr(v)
		if err != nil {
			return f, fmt.Errorf("client must be an IP address: %q", v)
		}
		f.Client = registry.ClientIP(ip)
	}
	if v, ok := q["kind"]; ok {
		if f.Kind = registry.Kind(v); f.Kind != registry.WebSocket && f.Kind != registry.Passthrough {
			return f, fmt.Errorf("unknown kind %q", v)
		}
	}
	if v, ok := q["state"]; ok {
		s, err := registry.ParseState(v)
		if err != nil {
			return f, err
		}
		f.State = &s
	}
	if v, ok := q["min_age"]; ok {
		if f.MinAge, err = duration("min_age", v); err != nil {
			return f, err
		}
	}
	return f, nil
}

// duration reads a duration as Caddy writes it, or a number of seconds.
func duration(name, v string) (time.Duration, error) {
	if seconds, err := strconv.ParseUint(v, 10, 32); err == nil {
		return time.Duration(seconds) * time.Second, nil
	}
	d, err := caddy.ParseDuration(v)
	if err == nil && d < 0 {
		err = errors.New("it is negative")
	}
	if err != nil {
		return 0, fmt.Errorf("%s must be a duration: %q: %w", name, v, err)
	}
	return d, nil
}
