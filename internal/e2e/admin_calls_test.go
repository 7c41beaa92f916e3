// This file asks the admin API, and says what it shows.

package e2e

import (
	"bytes"
	"encoding/json"
	"io"
	"net/http"
	"testing"
	"time"
)

// request sends a request to the admin API and returns the status and the body.
func (p *proxy) request(t testing.TB, method, path string) (int, []byte) {
	t.Helper()
	req, err := http.NewRequest(method, "http://"+p.admin+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Close = true // no idle connection that would count as a leak
	res, err := http.DefaultClient.Do(req)
	if err != nil && method == http.MethodGet {
		// A reload resets connections that the listener it replaces has not accepted.
		res, err = http.DefaultClient.Do(req)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res.StatusCode, body
}

// post sends something to the admin API, over a connection of its own.
func (p *proxy) post(path, contentType string, body []byte) (int, []byte, error) {
	req, err := http.NewRequest(http.MethodPost, "http://"+p.admin+path, bytes.NewReader(body))
	if err != nil {
		return 0, nil, err
	}
	req.Header.Set("Content-Type", contentType)
	req.Close = true
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer res.Body.Close()
	answer, err := io.ReadAll(res.Body)
	return res.StatusCode, answer, err
}

// call is request, and decodes what comes back into out unless that is nil.
func (p *proxy) call(t testing.TB, method, path string, out any) int {
	t.Helper()
	status, body := p.request(t, method, path)
	if out != nil {
		if err := json.Unmarshal(body, out); err != nil {
			t.Fatalf("%s %s: %v: %s", method, path, err, body)
		}
	}
	return status
}

// connection is a connection as the admin API shows it.
type connection struct {
	ID, Kind, Route, State, Reason, Client, Upstream, Dial, Host, URI, Protocol, Subprotocol string
	Age, Idle                                                                                float64
	BytesIn                                                                                  uint64 `json:"bytes_in"`
	BytesOut                                                                                 uint64 `json:"bytes_out"`
	MessagesIn                                                                               uint64 `json:"messages_in"`
	MessagesOut                                                                              uint64 `json:"messages_out"`
}

// stats are the registry's totals.
type stats struct {
	Total          int
	ByState        map[string]int `json:"by_state"`
	ByUpstream     map[string]int `json:"by_upstream"`
	ByRoute        map[string]int `json:"by_route"`
	ClosedByReason map[string]int `json:"closed_by_reason"`
}

func (p *proxy) connections(t testing.TB) []connection {
	t.Helper()
	var list struct{ Connections []connection }
	p.call(t, http.MethodGet, "/connections?limit=1000", &list)
	return list.Connections
}

func (p *proxy) stats(t testing.TB) stats {
	t.Helper()
	var s stats
	p.call(t, http.MethodGet, "/connections/stats", &s)
	return s
}

// waitEmpty waits until the registry is empty.
func (p *proxy) waitEmpty(t testing.TB) {
	t.Helper()
	var s stats
	if !eventually(20*time.Second, func() bool { s = p.stats(t); return s.Total == 0 }) {
		t.Errorf("connections left in the registry: %+v: %+v", s, p.connections(t))
	}
}
